/* What integer_products.c asks of the two instruction sets that multiply pairs of 16 bits: AVX-512 VNNI, and AVX-VNNI, with vectors of
   half the size, which Intel's desktop CPUs have had since the 12th generation. */

#include <cpuid.h>
#include <immintrin.h>
#include <stdint.h>

enum { BLOCK = 128, PAIRS = BLOCK / 2 };
enum { TILE_ROWS = 8, PANEL = 48 };

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

#ifdef __AVX512VNNI__

enum { LANES = 16 };
typedef __m512 Floats;
typedef __m512i Ints;
typedef __mmask16 Where;

static inline Where first_lanes(long count) { return count >= LANES ? 0xffff : count <= 0 ? 0 : (Where)((1u << count) - 1); }
static inline Floats zeros(void) { return _mm512_setzero_ps(); }
static inline Floats all(float value) { return _mm512_set1_ps(value); }
static inline Floats read(const float *from) { return _mm512_load_ps(from); }
static inline Floats read_some(const float *from, long count) { return _mm512_maskz_loadu_ps(first_lanes(count), from); }
static inline void write(float *to, Floats x) { _mm512_store_ps(to, x); }
static inline void write_past(float *to, Floats x) { _mm512_stream_ps(to, x); }
static inline void write_some(float *to, long count, Floats x) { _mm512_mask_storeu_ps(to, first_lanes(count), x); }
static inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
static inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
static inline Floats times_plus(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline Floats over(Floats a, Floats b) { return _mm512_div_ps(a, b); }
static inline Floats greater(Floats a, Floats b) { return _mm512_max_ps(a, b); }
static inline Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
static inline float greatest(Floats x) { return _mm512_reduce_max_ps(x); }
static inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
static inline Where at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
static inline Where below(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline Floats only(Where where, Floats x) { return _mm512_maskz_mov_ps(where, x); }
static inline unsigned lanes(Where where) { return where; }

static inline Floats widened(const uint16_t *from, long count, int is_fp16) {
    const __m256i half = _mm256_maskz_loadu_epi16(first_lanes(count), from);
    return is_fp16 ? _mm512_cvtph_ps(half) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
static inline Ints whole(Floats x) { return _mm512_cvtps_epi32(x); }
static inline Floats fractions(const int32_t *from) { return _mm512_cvtepi32_ps(_mm512_load_si512(from)); }
static inline void write_codes(int16_t *to, Ints x) { _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(x)); }
static inline void write_pairs(int32_t *to, Ints first, Ints second) {
    _mm512_store_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, first, _mm512_slli_epi32(second, 16)));
}
/* to (lanes) = one pair of each of so many rows of 64 pairs. */
static inline void write_column(int32_t *to, const int32_t *rows) {
    const Ints lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    _mm512_store_si512(to, _mm512_i32gather_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(PAIRS)), rows, 4));
}

int supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

/* sums (8, 48) of x codes (8, 128) with w codes (64 pairs, 48). In assembly, as GCC 12 to 14 spill the 24 sums that fit into
   registers, and are then no faster than fp32. */
#define CLEAR(sum) "vpxord %%zmm" TEXT(sum) ", %%zmm" TEXT(sum) ", %%zmm" TEXT(sum) "\n\t"
#define KEEP(sum, place) "vmovdqa32 %%zmm" TEXT(sum) ", " TEXT(place) "(%[sums])\n\t"
#define MULTIPLY(w, x, sum) "vpdpwssd %%zmm" TEXT(w) ", %%zmm" TEXT(x) ", %%zmm" TEXT(sum) "\n\t"
#define ROW(place, x, one, two, three) \
    "vpbroadcastd " TEXT(place) "(%[x]), %%zmm" TEXT(x) "\n\t" MULTIPLY(0, x, one) MULTIPLY(1, x, two) MULTIPLY(2, x, three)
static inline void sum_tile(const int16_t *x, const int32_t *w, int32_t *sums) {
    long pairs = PAIRS;
    __asm__ volatile(
        CLEAR(8) CLEAR(9) CLEAR(10) CLEAR(11) CLEAR(12) CLEAR(13) CLEAR(14) CLEAR(15) CLEAR(16) CLEAR(17) CLEAR(18) CLEAR(19)
        CLEAR(20) CLEAR(21) CLEAR(22) CLEAR(23) CLEAR(24) CLEAR(25) CLEAR(26) CLEAR(27) CLEAR(28) CLEAR(29) CLEAR(30) CLEAR(31)
        ".p2align 5\n"
        "1:\n\t"
        "vmovdqa32 (%[w]), %%zmm0\n\t"
        "vmovdqa32 64(%[w]), %%zmm1\n\t"
        "vmovdqa32 128(%[w]), %%zmm2\n\t"
        ROW(0, 3, 8, 9, 10) ROW(256, 4, 11, 12, 13) ROW(512, 5, 14, 15, 16) ROW(768, 6, 17, 18, 19)
        ROW(1024, 3, 20, 21, 22) ROW(1280, 4, 23, 24, 25) ROW(1536, 5, 26, 27, 28) ROW(1792, 6, 29, 30, 31)
        "add $4, %[x]\n\t"
        "add $192, %[w]\n\t"
        "dec %[pairs]\n\t"
        "jnz 1b\n\t"
        KEEP(8, 0) KEEP(9, 64) KEEP(10, 128) KEEP(11, 192) KEEP(12, 256) KEEP(13, 320) KEEP(14, 384) KEEP(15, 448)
        KEEP(16, 512) KEEP(17, 576) KEEP(18, 640) KEEP(19, 704) KEEP(20, 768) KEEP(21, 832) KEEP(22, 896) KEEP(23, 960)
        KEEP(24, 1024) KEEP(25, 1088) KEEP(26, 1152) KEEP(27, 1216) KEEP(28, 1280) KEEP(29, 1344) KEEP(30, 1408) KEEP(31, 1472)
        : [x] "+r"(x), [w] "+r"(w), [pairs] "+r"(pairs)
        : [sums] "r"(sums)
        : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
          "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25",
          "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
}

#else

enum { LANES = 8 };
typedef __m256 Floats;
typedef __m256i Ints;
typedef __m256 Where;

static inline __m256i first_lanes(long count) {
    static const int32_t steps[2 * LANES] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256((const __m256i *)(steps + LANES - (count >= LANES ? LANES : count <= 0 ? 0 : count)));
}
static inline Floats zeros(void) { return _mm256_setzero_ps(); }
static inline Floats all(float value) { return _mm256_set1_ps(value); }
static inline Floats read(const float *from) { return _mm256_load_ps(from); }
static inline Floats read_some(const float *from, long count) { return _mm256_maskload_ps(from, first_lanes(count)); }
static inline void write(float *to, Floats x) { _mm256_store_ps(to, x); }
static inline void write_past(float *to, Floats x) { _mm256_stream_ps(to, x); }
static inline void write_some(float *to, long count, Floats x) { _mm256_maskstore_ps(to, first_lanes(count), x); }
static inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
static inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats times_plus(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline Floats over(Floats a, Floats b) { return _mm256_div_ps(a, b); }
static inline Floats greater(Floats a, Floats b) { return _mm256_max_ps(a, b); }
static inline Floats magnitude(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
static inline float greatest(Floats x) {
    float largest = x[0];
    for (int i = 1; i < LANES; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}
static inline float sum(Floats x) {
    float total = x[0];
    for (int i = 1; i < LANES; i++) total += x[i];
    return total;
}
static inline Where at_least(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
static inline Where below(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline Floats only(Where where, Floats x) { return _mm256_and_ps(where, x); }
static inline unsigned lanes(Where where) { return _mm256_movemask_ps(where); }

static inline Floats widened(const uint16_t *from, long count, int is_fp16) {
    uint16_t some[LANES] = {0};
    if (count < LANES) { /* reading past the last value could leave the matrix */
        for (long i = 0; i < count; i++) some[i] = from[i];
        from = some;
    }
    const __m128i half = _mm_loadu_si128((const __m128i *)from);
    return is_fp16 ? _mm256_cvtph_ps(half) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline Ints whole(Floats x) { return _mm256_cvtps_epi32(x); }
static inline Floats fractions(const int32_t *from) { return _mm256_cvtepi32_ps(_mm256_load_si256((const __m256i *)from)); }
static inline void write_codes(int16_t *to, Ints x) {
    _mm_storeu_si128((__m128i *)to, _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
static inline void write_pairs(int32_t *to, Ints first, Ints second) {
    _mm256_store_si256((__m256i *)to, _mm256_blend_epi16(first, _mm256_slli_epi32(second, 16), 0xaa));
}
/* to (lanes) = one pair of each of so many rows of 64 pairs. */
static inline void write_column(int32_t *to, const int32_t *rows) {
    const Ints lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    _mm256_store_si256((__m256i *)to, _mm256_i32gather_epi32(rows, _mm256_mullo_epi32(lane, _mm256_set1_epi32(PAIRS)), 4));
}

int supported(void) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}

/* As above, 4 rows and 24 outputs at a time: 12 sums in 16 registers. */
#define CLEAR(sum) "vpxor %%ymm" TEXT(sum) ", %%ymm" TEXT(sum) ", %%ymm" TEXT(sum) "\n\t"
#define KEEP(sum, place) "vmovdqa %%ymm" TEXT(sum) ", " TEXT(place) "(%[sums])\n\t"
#define MULTIPLY(w, x, sum) "%{vex%} vpdpwssd %%ymm" TEXT(w) ", %%ymm" TEXT(x) ", %%ymm" TEXT(sum) "\n\t"
#define ROW(place, one, two, three) \
    "vpbroadcastd " TEXT(place) "(%[x]), %%ymm3\n\t" MULTIPLY(0, 3, one) MULTIPLY(1, 3, two) MULTIPLY(2, 3, three)
static inline void sum_quarter(const int16_t *x, const int32_t *w, int32_t *sums) {
    long pairs = PAIRS;
    __asm__ volatile(
        CLEAR(4) CLEAR(5) CLEAR(6) CLEAR(7) CLEAR(8) CLEAR(9) CLEAR(10) CLEAR(11) CLEAR(12) CLEAR(13) CLEAR(14) CLEAR(15)
        ".p2align 5\n"
        "1:\n\t"
        "vmovdqa (%[w]), %%ymm0\n\t"
        "vmovdqa 32(%[w]), %%ymm1\n\t"
        "vmovdqa 64(%[w]), %%ymm2\n\t"
        ROW(0, 4, 5, 6) ROW(256, 7, 8, 9) ROW(512, 10, 11, 12) ROW(768, 13, 14, 15)
        "add $4, %[x]\n\t"
        "add $192, %[w]\n\t"
        "dec %[pairs]\n\t"
        "jnz 1b\n\t"
        KEEP(4, 0) KEEP(5, 32) KEEP(6, 64) KEEP(7, 192) KEEP(8, 224) KEEP(9, 256)
        KEEP(10, 384) KEEP(11, 416) KEEP(12, 448) KEEP(13, 576) KEEP(14, 608) KEEP(15, 640)
        : [x] "+r"(x), [w] "+r"(w), [pairs] "+r"(pairs)
        : [sums] "r"(sums)
        : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
          "xmm12", "xmm13", "xmm14", "xmm15");
}
static inline void sum_tile(const int16_t *x, const int32_t *w, int32_t *sums) {
    for (int row = 0; row < TILE_ROWS; row += TILE_ROWS / 2)
        for (int output = 0; output < PANEL; output += PANEL / 2)
            sum_quarter(x + row * BLOCK, w + output, sums + row * PANEL + output);
}

#endif
