"""The work of a step in C: elementwise parts, int8 products and attention, compiled on the machine that runs them.

Compiling takes about a second, once per machine and version; there is no build step at installation, and where no
compiler is found everything runs in torch's own operations, slower and equally right. Nothing heavier is loaded: a
compiler of graphs would cost more memory than the int8 model saves.
"""

from edgegt.native.build import compiler_words, library
from edgegt.native.kernels import Kernels, usable
from edgegt.native.reuse import reuse_memory, reused_bytes

__all__ = ["Kernels", "compiler_words", "library", "reuse_memory", "reused_bytes", "usable"]
