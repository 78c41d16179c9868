"""Microbenchmarks of pst_kernels against dense training, LoRA and the released algorithm: `python -m bench`."""

import os

# The profiler behind `measure.peak_bytes` tells stderr of its starts and stops, and of memory freed that it had not
# seen allocated, unless it is told not to before torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
