"""`python -m llmjax.cli`: the same as the command `llmjax`."""

from llmjax.cli import main

if __name__ == "__main__":
    main()
