# Compiler flags of each level's units, for the kernels and for their tests.
#
# No contraction: where a product and a sum are rounded once is said in the source, so that paths agree to the bit.
set(sse2_flags -O3 -fno-math-errno -fno-trapping-math -ffp-contract=off)
# GCC 12 schedules all loads of the micro-kernel's step first, which takes two registers more than there are.
set(neon_flags ${sse2_flags} -fno-schedule-insns)
set(avx2_flags ${sse2_flags} -mavx2 -mfma -mf16c)
# GCC 12 warns of uninitialized values inside its own AVX-512 intrinsics.
set(avx512_flags ${sse2_flags} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512
                 -Wno-maybe-uninitialized -Wno-uninitialized)
set(avx512_vnni_flags ${avx512_flags} -mavx512vnni)
set(avx512_bf16_flags ${avx512_flags} -mavx512bf16)
set(amx_flags ${avx512_bf16_flags})  # its own instructions are written as such
