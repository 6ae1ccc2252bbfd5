"""The process that compiles a plan's steps on virtual CPU devices: `read_steps` starts it."""

import sys

from llmjax.explore.steps import answer_job

if __name__ == "__main__":
    print(answer_job(sys.stdin.read()))
