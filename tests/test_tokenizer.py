"""Tokenizers and chat templates against Hugging Face's results, and streams of text."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from llmjax.tokenizer import ChatTemplateError, StreamDecoder, Tokenizer, load_tokenizer
from llmjax.tokenizer.chat_template import ChatTemplate
from llmjax.weights import EMBEDDED_MODEL, CheckpointError, open_checkpoint

GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "smollm2_tokenizer.json").read_text(encoding="utf-8")
)
EMOJI = "A family: 👩‍👩‍👧‍👦, 日本語, 🇫🇷!"


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    tokenizer = load_tokenizer(open_checkpoint(EMBEDDED_MODEL).path)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda case: ascii(case["text"][:20]))
def test_the_embedded_tokenizer_gives_hugging_faces_ids_and_gives_the_text_back(smollm2, case):
    assert smollm2.encode(case["text"]) == case["ids"]
    assert smollm2.decode(case["ids"], skip_special_tokens=False) == case["text"]


@pytest.mark.parametrize("case", GOLDEN["chats"])
def test_the_embedded_chat_template_gives_hugging_faces_prompts(smollm2, case):
    prompt = smollm2.apply_chat_template(
        case["messages"], add_generation_prompt=case["add_generation_prompt"]
    )
    assert prompt == case["prompt"]


def test_the_embedded_tokenizer_splits_digits_off_before_spaces(smollm2):
    # Two spaces stay one token. Hugging Face's GGUF reader ignores the file's pre-tokenizer here.
    assert [smollm2.token_text(i) for i in smollm2.encode("a  20")] == ["a", "  ", "2", "0"]


def test_stop_ids_come_from_the_file(smollm2):
    assert smollm2.stop_ids == (2,)
    assert smollm2.token_text(2) == "<|im_end|>"
    assert smollm2.bos_id == 1
    assert smollm2.vocab_size == 49152


def test_special_tokens_are_skipped_only_where_asked(smollm2):
    ids = smollm2.encode("Paris<|im_end|>")
    assert smollm2.decode(ids) == "Paris"
    assert smollm2.decode(ids, skip_special_tokens=False) == "Paris<|im_end|>"


def stream(tokenizer, ids, skip_special_tokens=True) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip_special_tokens)
    return [*(decoder.push([token]) for token in ids), decoder.flush()]


@given(text=st.text(max_size=30))
def test_streamed_pieces_join_to_the_whole_text(smollm2, text):
    ids = smollm2.encode(text, add_special_tokens=False)
    for skip in (True, False):
        whole = smollm2.decode(ids, skip_special_tokens=skip).rstrip("\ufffd")
        assert "".join(stream(smollm2, ids, skip)).rstrip("\ufffd") == whole


def test_a_stream_never_shows_half_a_character(smollm2):
    ids = smollm2.encode(EMOJI)
    assert any("\ufffd" in smollm2.token_text(i) for i in ids)  # characters do span tokens
    pieces = stream(smollm2, ids)
    assert "".join(pieces) == EMOJI
    assert not any("\ufffd" in piece for piece in pieces)
    for length in range(len(ids)):
        cut = "".join(stream(smollm2, ids[:length]))
        assert EMOJI.startswith(cut)


def test_a_stream_goes_on_after_bytes_that_are_no_character(smollm2):
    stray = smollm2.encode("👩")[-1]
    ids = [stray, *smollm2.encode("ok then")]
    assert "".join(stream(smollm2, ids)) == smollm2.decode(ids)


def write_folder(folder: Path, **config) -> Path:
    """Write a tokenizer of five words, with "<s>" put before each text."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>", "special": True}, "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def test_a_folders_tokenizer_has_its_special_tokens(tmp_path):
    tokenizer = load(write_folder(tmp_path))
    assert tokenizer.encode("hello world") == [1, 3, 4]
    assert tokenizer.encode("hello world", add_special_tokens=False) == [3, 4]
    assert (tokenizer.bos_id, tokenizer.stop_ids, tokenizer.vocab_size) == (1, (2,), 5)


def test_tokens_that_only_the_configuration_declares_are_added(tmp_path):
    added = {"5": {"content": "<tool>", "special": True}, "4": {"content": "world"}}
    tokenizer = load(write_folder(tmp_path, added_tokens_decoder=added))
    assert tokenizer.encode("hello<tool>", add_special_tokens=False) == [3, 5]
    assert tokenizer.decode([3, 5]) == "hello"


def test_a_chat_template_is_found_in_each_of_its_places(tmp_path):
    hello = [{"role": "user", "content": "hello"}]

    def render() -> str:
        return load(tmp_path).apply_chat_template(hello)

    write_folder(tmp_path, chat_template="{{ bos_token }}plain")
    assert render() == "<s>plain"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "named"}]
    write_folder(tmp_path, chat_template=named)
    assert render() == "named"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert render() == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert render() == "jinja"


def test_a_model_without_a_chat_template_says_so(tmp_path):
    tokenizer = load(write_folder(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(ChatTemplateError, match="the model has no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_a_tokenizer_of_another_kind_says_how_to_convert_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has tokenizer.model but no tokenizer.json"):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer_files_are_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="chat_template.jinja is not UTF-8"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_templates_have_hugging_faces_whitespace_filters_and_functions():
    source = (
        "{%- for m in messages %}\n"
        "  {% if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "[{{ m.role }}]{% generation %}{{ m.content }}{% endgeneration %}\n"
        "{% endfor %}\n"
        "{{ tools | tojson }}{{ strftime_now('%Y') | length }}{{ mood }}"
    )
    messages = [{"role": "tool", "content": ""}, {"role": "user", "content": "<é>"}]
    text = ChatTemplate(source, {}).render(messages, tools=[{"name": "<é>"}], mood="!")
    assert text == '[user]<é>[{"name": "<é>"}]4!'


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", [{"role": "user"}], "must alternate"),
        ("{{ messages.append(1) }}", [{"role": "user"}], "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", [{"role": "user"}], "refuses these messages"),
        ("x", [], "the conversation is empty"),
        ("x", [{"content": "hi"}], "message 0 is {'content': 'hi'}; each message is a mapping"),
    ],
)
def test_what_a_template_refuses_is_one_sentence(source, messages, message):
    with pytest.raises(ChatTemplateError) as raised:
        ChatTemplate(source, {}).render(messages)
    assert message in str(raised.value)


def test_a_template_that_does_not_compile_names_its_line():
    with pytest.raises(ChatTemplateError, match="does not compile .line 2"):
        ChatTemplate("fine\n{% if %}", {})


@pytest.fixture
def write_gguf(tmp_path):
    """Write a GGUF file whose vocabulary is the bytes and a few merges."""

    def write(*, model="gpt2", pre="qwen2", **flags) -> Path:
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        tokens = ["<s>", *alphabet, "12", "ab", "abc", "<tool>"]
        kinds = [gguf.TokenType.NORMAL] * len(tokens)
        kinds[0], kinds[-1] = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(["1 2", "a b"])
        writer.add_bos_token_id(0)
        for key, value in flags.items():
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        writer.add_tensor("token_embd.weight", np.zeros((1, 1), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "model.gguf"

    return write


def tokens_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token_text(i) for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["12"]),
        ("smollm", ["1", "2"]),
        ("qwen2", ["1", "2"]),
        ("llama-bpe", ["<s>", "12"]),
    ],
)
def test_each_pre_tokenizer_splits_digits_in_its_way(write_gguf, pre, pieces):
    assert tokens_of(load(write_gguf(pre=pre)), "12") == pieces


def test_a_piece_that_is_a_token_is_taken_whole_by_llama3s_tokenizer_only(write_gguf):
    assert tokens_of(load(write_gguf(pre="llama-bpe")), "abc") == ["<s>", "abc"]
    assert tokens_of(load(write_gguf(pre="qwen2")), "abc") == ["ab", "c"]


def test_the_file_says_whether_a_text_begins_with_bos(write_gguf):
    assert tokens_of(load(write_gguf(add_bos_token=True)), "ab") == ["<s>", "ab"]
    assert tokens_of(load(write_gguf(pre="llama-bpe", add_bos_token=False)), "ab") == ["ab"]


def test_user_defined_tokens_are_whole_but_not_special(write_gguf):
    tokenizer = load(write_gguf())
    assert tokens_of(tokenizer, "ab<tool>") == ["ab", "<tool>"]
    assert tokenizer.decode(tokenizer.encode("<s>ab<tool>")) == "ab<tool>"


@pytest.mark.parametrize(("model", "pre"), [("llama", "default"), ("gpt2", "tekken")])
def test_a_gguf_tokenizer_of_another_kind_is_refused_by_name(write_gguf, model, pre):
    with pytest.raises(CheckpointError, match=f"model {model} and pre-tokenizer {pre}"):
        load_tokenizer(write_gguf(model=model, pre=pre))
