"""Models of other libraries on our kernels: one module per library, imported only when called."""
