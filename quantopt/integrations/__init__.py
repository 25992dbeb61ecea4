"""Packed layers and optimizers in other libraries: a module per library, each imported only when asked for."""
