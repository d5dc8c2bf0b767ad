"""Kernel tests run on the GPU if there is one, else on the CPU through Triton's interpreter."""

import os
import sys
from pathlib import Path

import torch

# Triton reads this when it is imported, so before the test modules are
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    # For each launch and each call of a device function, `_patch_lang` wraps every function of triton.language: half of
    # a kernel's time here. Once is enough, where nothing is compiled.
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang

    def patch_once(function):
        visible = {id(value) for value in function.__globals__.values()}
        languages = [tl for tl in (interpreter.tl, interpreter.tl.core) if id(tl) in visible]
        if not all(tl.load.__name__ == "<lambda>" for tl in languages):
            patch_lang(function)
        return interpreter._LangPatchScope()

    # an older Triton keeps no account of what it wraps
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patch_once

# the importlib import mode leaves a test's own folder off the path
sys.path.insert(0, str(Path(__file__).parent))
