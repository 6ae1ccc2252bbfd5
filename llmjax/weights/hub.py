"""Downloads a model folder from the Hugging Face hub, or finds it in the hub's cache."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from llmjax.weights.interface import CheckpointError

# No *.bin, *.pt, *.pth: pickles are never read, so they are not downloaded either.
_WEIGHTS = ("*.safetensors",)
_OTHERS = ("*.json", "*.jinja", "*.model")


def download_model(hub_id: str, *, embedded: str, needs_weights: bool = True) -> Path:
    """Return the local folder of a hub model, downloading what is not cached.

    Args:
        embedded: the model that needs no download, named in the errors.
        needs_weights: otherwise only configuration and tokenizer are downloaded.

    Raises:
        CheckpointError: the id does not exist, needs a login, or cannot be reached.
    """
    instead = f'Use a local folder, a .gguf file or the embedded model "{embedded}" instead'
    files = [*_OTHERS, *(_WEIGHTS if needs_weights else ())]
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=files))
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{hub_id} is a gated model: accept its terms on https://huggingface.co/{hub_id} and "
            f"log in with `hf auth login`. {instead}."
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"unknown model {hub_id!r}: there is no such folder or file here, and no such public "
            "model on the Hugging Face hub (a private one needs `hf auth login`). "
            f"{instead}."
        ) from None
    except errors.HFValidationError:
        raise CheckpointError(
            f"unknown model {hub_id!r}: there is no such folder or file here, and a hub id reads "
            f'"owner/name". {instead}.'
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        # LocalEntryNotFoundError (offline and not cached) is an OSError, as are network failures.
        raise CheckpointError(
            f"{hub_id!r} is no folder or file here, is not in the Hugging Face cache, and the hub "
            f"could not be reached ({type(error).__name__}). Check the name and the connection. "
            f"{instead}."
        ) from error
