"""Names of the number formats that a decoder may have; loads nothing."""

from typing import Final

# safetensors' codes and torch's names, and the way back
STORED_DTYPES: Final = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
STORED_CODES: Final = {name: code for code, name in STORED_DTYPES.items()}
