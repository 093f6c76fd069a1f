"""The monitor on a Hugging Face Trainer: `gnsmon.hf.attach(trainer)`.

Needs `pip install "gnsmon[transformers]"`.
"""

from gnsmon.hf.callback import GNSCallback, attach

__all__ = ["GNSCallback", "attach"]
