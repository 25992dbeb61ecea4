"""The optional libraries: which extra of the distribution has each, and what is said where one is missing."""

DISTRIBUTION = "torch-quantopt"

EXTRAS = {
    "gguf": "gguf",
    "matplotlib": "train",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "peft": "peft",
    "pillow": "train",
    "scikit-learn": "train",
    "tensorboard": "tensorboard",
    "transformers": "transformers",
    "triton": "triton",
}
"""The extra of each library without which something refuses to run."""


def missing(*libraries: str, why: ImportError, extra: str | None = None) -> str:
    """What is said, in one line, where optional `libraries` cannot be imported; why: what the import raised; extra: the
    one to install, where it is not the libraries' own."""
    extras = extra or ",".join(dict.fromkeys(EXTRAS[library] for library in libraries))
    reason = str(why).partition("\n")[0]
    return f"needs {' and '.join(libraries)}: pip install '{DISTRIBUTION}[{extras}]' ({reason})"
