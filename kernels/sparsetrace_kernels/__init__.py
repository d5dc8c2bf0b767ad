"""GPU kernels: sparse GEMV with fused capture, list and row producers, decode attention, packing, histogram.

Importing this package loads nothing: `reference` needs torch only, the other modules need Triton.

| module | op | what |
|---|---|---|
| reference | | torch-only oracles, and the reference ops of the torch engine |
| sparse_gemv | `sparse_gemv` | threshold, multiply and capture in one launch |
| list_gemv | `list_gemv` | multiply over lists that a producer made |
| add_rmsnorm, silu_mul, compact | same names | producers: threshold, list and capture |
| decode_attention | `decode_attention` | rotary embedding, cache write and attention of one token per slot |
| | `decode_attention_list` | the same for one slot, as a producer |
| masked_rows | `mask_rows`, `add_rmsnorm_rows`, `silu_mul_rows` | producers for dense products: mask, capture |
| draw_tokens | `draw_tokens` | next tokens from logits |
| decode_state | `place_rows`, `advance` | bookkeeping between decoding steps |
| rotate_rows | `rotate_rows` | rotary embedding and cache write of many rows |
| pack | `pack`, `pack_regions` | masked block, or a ring of them, to bitmask, kept bit patterns and row starts |
| histogram | `add_histogram` | exact counts of 16-bit patterns |
| configs, tune | | choice of kernel configurations; measurement of a table of them |
| partials | | partial sums that programs of one launch hand to the last of them |
| primitives, checks | | what the kernels, and the ops' checks, share |
"""
