"""What the server of tests/forked.py imports, so that its copies need not."""

import os

os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")  # what has threads or CUDA cannot be copied

import pytest  # noqa: F401
import transformers.modeling_utils  # noqa: F401

import trainer.worker  # noqa: F401
from trainer import engine

engine.preload()
