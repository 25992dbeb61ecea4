"""A small language-model trainer on the bytes of a text file: `quantopt lm`."""
