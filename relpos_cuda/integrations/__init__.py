"""Models of other libraries on our kernels.

One module per library, which it imports only when one of its functions is called.
"""
