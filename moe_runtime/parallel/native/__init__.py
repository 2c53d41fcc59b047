"""Native code of the data plane, shipped as C source and compiled once on the machine that runs it."""
