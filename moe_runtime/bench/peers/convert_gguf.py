"""Run llama.cpp's converter on a checkpoint without its tokenizer, which a benchmark of token ids does not need.

Run by file name: PYTHON convert_gguf.py CONVERTER [the converter's arguments]. A random checkpoint has no tokenizer,
and the converter refuses tokenizers that it has no name for.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Import the converter's own package, leave the vocabulary out, and run it as if it had been started itself."""
    converter = sys.argv[1]
    sys.path[0] = str(Path(converter).parent)
    from conversion.base import TextModel  # type: ignore[import-not-found]

    TextModel.set_vocab = _only_its_size
    sys.argv = sys.argv[1:]
    runpy.run_path(converter, run_name="__main__")


def _only_its_size(model: Any) -> None:
    model.gguf_writer.add_tokenizer_model("none")
    model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])


if __name__ == "__main__":
    main()
