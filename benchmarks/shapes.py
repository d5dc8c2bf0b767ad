"""Shapes of the multiplies that are timed: (inputs, outputs)."""

# Llama-2-7B, Llama-3-8B and 70B matrices; the bars are geometric means over these
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192)]
# the fused ones that decoding launches: q|k|v and gate|up of 7B and 8B
FUSED_SHAPES = [(4096, 12288), (4096, 22016), (4096, 6144), (4096, 28672)]
