"""GPU kernels: sparse GEMV with fused capture, list and row producers, decode attention, packing, histogram.

Importing this package loads nothing: `torch_ops` and `reference` need torch only, the other modules need Triton.

| module | op | what |
|---|---|---|
| torch_ops | | operations of the torch engine, which define masks and operands |
| reference | | oracles of the kernels, for tests |
| list_gemv | `list_gemv` | multiply over lists that a producer has made: what the engine launches |
| add_rmsnorm, silu_mul, compact | same names | list producers: threshold, list and capture |
| decode_attention | `decode_attention` | rotary embedding, cache write and attention of one token per slot |
| | `decode_attention_list` | the same for one slot, as a list producer |
| masked_rows | `mask_rows`, `add_rmsnorm_rows`, `silu_mul_rows` | row producers for dense multiplies: mask, capture |
| draw_tokens | `draw_tokens` | next tokens from logits |
| decode_state | `place_rows`, `advance` | bookkeeping between decoding steps |
| rotate_rows | `rotate_rows` | rotary embedding and cache write of many rows |
| pack | `pack`, `pack_regions` | masked block, or a ring of them, to bitmask, kept bit patterns and row starts |
| histogram | `add_histogram` | exact counts of 16-bit patterns |
| sparse_gemv | `sparse_gemv` | threshold, multiply and capture in one launch, for benchmarks |
| configs, tune | | choice of kernel configurations; measurement of a table of them |
| gemv_problem, timing | | what tuning and benchmarks time, and how |
| partials | | split-K reduction within one launch |
| primitives, rotary, checks | | what kernels, and the checks of ops, share |
"""
