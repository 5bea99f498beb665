// The vector length and the name of the instruction set that a file is compiled for (setup.py), and the name that a
// table of kernels has for it: TTT_FOR_ISA(kernels) is kernels_avx2 where the flags are those of AVX2.
#pragma once

#define TTT_JOINED_NAMES(what, isa) what##_##isa
#define TTT_JOINED(what, isa) TTT_JOINED_NAMES(what, isa)
#define TTT_FOR_ISA(what) TTT_JOINED(what, TTT_ISA)

#if defined(TTT_ISA_AVX512BF16)
#define TTT_VL 16
#define TTT_ISA avx512bf16
#define TTT_NAME "avx512bf16"
#elif defined(TTT_ISA_AVX512)
#define TTT_VL 16
#define TTT_ISA avx512
#define TTT_NAME "avx512"
#elif defined(TTT_ISA_AVX2)
#define TTT_VL 8
#define TTT_ISA avx2
#define TTT_NAME "avx2"
#else
#define TTT_VL 4
#define TTT_ISA portable
#define TTT_NAME "portable"
#endif
