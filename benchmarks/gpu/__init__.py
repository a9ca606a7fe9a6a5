"""`python -m benchmarks.gpu`: prove dsmoe on a machine with CUDA devices and measure it there, in a few minutes."""
