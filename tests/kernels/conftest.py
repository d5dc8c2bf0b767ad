"""Kernel tests run on the GPU if there is one, else on the CPU in Triton's interpreter."""

import os
import sys
from pathlib import Path

import torch

# set before the test modules are imported, since Triton reads it when it is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    # `_patch_lang` wraps every function of triton.language anew for each launch and each call of a device function,
    # which takes half of a kernel's time here. As nothing is compiled, once is enough.
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang

    def patch_once(function):
        visible = {id(value) for value in function.__globals__.values()}
        languages = [tl for tl in (interpreter.tl, interpreter.tl.core) if id(tl) in visible]
        if not all(tl.load.__name__ == "<lambda>" for tl in languages):
            patch_lang(function)
        return interpreter._LangPatchScope()

    # older versions of Triton do not record what they wrap
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patch_once

# with import mode importlib, pytest does not put a test's folder on the path
sys.path.insert(0, str(Path(__file__).parent))
