"""What stands in a kernel's place: quantized arrays, and what is done to the trees that hold them."""
