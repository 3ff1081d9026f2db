"""Arrays as their dtype says them: what annotations all over the package are written with."""

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

# What numpy returns to index other arrays with (argsort, flatnonzero, ...): as wide as a pointer.
IndexArray = NDArray[np.intp]
