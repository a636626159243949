"""One handwritten digit in 32 x 32 pixels: about 15 minutes on two CPU cores, a minute or two on a GPU."""
