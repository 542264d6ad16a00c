/* Products with a frozen matrix in integers, on CPUs that multiply pairs of 16 bits (AVX-512 VNNI).

   Both factors are cut along the sum into blocks of 128 values. Each block has a scale in fp32 and codes of 13 bits,
   code = round(4095 value / largest of the block), so that a block's sum is exact in 32 bits: 128 * 4095 * 4095 < 2^31.
   Blocks are added up in fp32, in an order that depends neither on the number of rows nor on that of threads. A value that is not
   finite makes its whole block NaN. A block whose largest value is below 1e-30 counts as zero.

   Activations of large models have values that are hundreds of times the others of their block, which would lose their digits. With
   limits, a value of x of more than 32 times the mean magnitude of the rest of its block is left out of the codes, and its products
   are added in fp32: no value of x is then rounded by more than 1/256 of the mean magnitude of its block.

   The matrix is read as it is stored, W (out, in) in fp32, bf16 or fp16, and made into codes a panel of 48 outputs at a time,
   which stay in the cache while all rows are multiplied with them. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 128, PAIRS = BLOCK / 2, LARGEST = 4095 };
enum { TILE_ROWS = 8, PANEL = 48, LANES = 16, VECTORS = PANEL / LANES };
enum { ROWS_AT_ONCE = 64 };   /* their sums, 12 KB, stay in the first cache beside one block of a panel, 12 KB */
enum { WHOLE_SUM = 8, PART_OF_SUM = 4 }; /* blocks at once, for all outputs, then the next: the codes of a thousand rows, 1 MB, and
                                            as many rows of W are still in the second cache for the next panel */
enum { UNITS_PER_THREAD = 4, MOST_ROWS = 1024 };
enum { FP32, BF16, FP16 };
enum { OUTLIER = 32 }; /* times the mean magnitude of a block */

static const float TINY = 1e-30f;

typedef struct {
    const void *values;
    int dtype;
    long stride; /* from one row to the next, in values */
} Matrix;

/* x (rows, columns), with its codes (blocks, height, 128) and scales (blocks, height), where height is the rows filled up to whole
   tiles. What is above the limit (blocks, height) in magnitude is not in the codes; `limits` may be NULL. */
typedef struct {
    Matrix values;
    long rows, columns, height;
    int16_t *codes;
    float *scales, *limits;
} Coded;

static long least(long a, long b) { return a < b ? a : b; }

static long blocks_of(long columns) { return (columns + BLOCK - 1) / BLOCK; }

static long padded(long rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS; }

static __mmask16 first_lanes(long count) { return count >= LANES ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1); }

/* 16 values from (row, column) on; those beyond the mask are zero. */
static inline __m512 values_at(const Matrix *matrix, long row, long column, __mmask16 mask) {
    const long place = row * matrix->stride + column;
    if (matrix->dtype == FP32) return _mm512_maskz_loadu_ps(mask, (const float *)matrix->values + place);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)matrix->values + place);
    if (matrix->dtype == FP16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline void prefetch(const Matrix *matrix, long row, long column) {
    const long place = row * matrix->stride + column;
    _mm_prefetch((const char *)matrix->values + place * (matrix->dtype == FP32 ? 4 : 2), _MM_HINT_T0);
}

/* For 16 blocks: what their values are multiplied by, and their scales, NaN where `spoiled` is. */
static inline __m512 factors(__m512 largest, __m512 spoiled, __m512 *scales) {
    const __mmask16 counts = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(TINY), _CMP_GE_OQ);
    *scales = _mm512_add_ps(_mm512_maskz_mul_ps(counts, largest, _mm512_set1_ps(1.0f / LARGEST)), spoiled);
    return _mm512_maskz_div_ps(counts, _mm512_set1_ps(LARGEST), largest);
}

/* Codes (128) and scale of one block of values. */
static inline void code_block(const __m512 *values, int16_t *codes, float *scale) {
    __m512 largest = _mm512_setzero_ps(), spoiled = largest, scales;
    for (int i = 0; i < BLOCK / LANES; i++) {
        largest = _mm512_max_ps(largest, _mm512_abs_ps(values[i]));
        spoiled = _mm512_fmadd_ps(values[i], _mm512_setzero_ps(), spoiled); /* NaN once a value is not finite */
    }
    const __m512 factor = factors(
        _mm512_set1_ps(_mm512_reduce_max_ps(largest)), _mm512_set1_ps(_mm512_reduce_add_ps(spoiled)), &scales);
    *scale = _mm512_cvtss_f32(scales);
    for (int i = 0; i < BLOCK / LANES; i++) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(values[i], factor));
        _mm256_storeu_si256((__m256i *)(codes + LANES * i), _mm512_cvtepi32_epi16(whole));
    }
}

/* Zero the outliers among `width` finite values; returns the largest magnitude that is left, or infinity where nothing was zeroed. */
static inline float leave_out(__m512 *values, long width) {
    float limit = INFINITY;
    for (;;) {
        __m512 largest = _mm512_setzero_ps(), total = largest;
        for (int i = 0; i < BLOCK / LANES; i++) {
            const __m512 magnitudes = _mm512_abs_ps(values[i]);
            largest = _mm512_max_ps(largest, magnitudes);
            total = _mm512_add_ps(total, magnitudes);
        }
        const float most = _mm512_reduce_max_ps(largest), rest = _mm512_reduce_add_ps(total) - most;
        if (limit < INFINITY) limit = most;
        if (!(most * width > OUTLIER * rest) || !(rest < INFINITY) || width <= OUTLIER || most < TINY) return limit;
        limit = most; /* one more round, without it */
        const __m512 beyond = _mm512_set1_ps(most);
        for (int i = 0; i < BLOCK / LANES; i++)
            values[i] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(values[i]), beyond, _CMP_LT_OQ), values[i]);
    }
}

static inline void read_block(const Matrix *matrix, long row, long column, long width, __m512 *values) {
    for (int i = 0; i < BLOCK / LANES; i++)
        values[i] = values_at(matrix, row, column + LANES * i, first_lanes(width - LANES * i));
}

static void code_row(const Coded *x, long row, long block) {
    const long column = block * BLOCK, width = least(x->columns - column, BLOCK), place = block * x->height + row;
    __m512 values[BLOCK / LANES];
    read_block(&x->values, row, column, row < x->rows ? width : 0, values);
    if (x->limits) x->limits[place] = leave_out(values, width);
    code_block(values, x->codes + place * BLOCK, x->scales + place);
}

/* Whether rows `row` to `end` have outliers in a block. */
static int has_outliers(const Coded *x, long block, long row, long end) {
    const __m256 infinite = _mm256_set1_ps(INFINITY);
    for (; x->limits && row < end; row += TILE_ROWS)
        if (_mm256_cmp_ps_mask(_mm256_loadu_ps(x->limits + block * x->height + row), infinite, _CMP_LT_OQ)) return 1;
    return 0;
}

/* tile (8, 48) += the products of what was left out of one block, whose weights are plain (128, 48). */
static void add_outliers(const Coded *x, long row, long block, const float *plain, float *tile) {
    const long column = block * BLOCK, width = least(x->columns - column, BLOCK), place = block * x->height + row;
    for (long r = 0; r < least(TILE_ROWS, x->rows - row); r++, tile += PANEL) {
        if (!(x->limits[place + r] < INFINITY)) continue;
        const float *values = (const float *)x->values.values + (row + r) * x->values.stride + column;
        const __m512 limit = _mm512_set1_ps(x->limits[place + r]);
        for (long k = 0; k < width; k += LANES) {
            const __m512 some = _mm512_maskz_loadu_ps(first_lanes(width - k), values + k);
            unsigned beyond = _mm512_cmp_ps_mask(_mm512_abs_ps(some), limit, _CMP_GT_OQ);
            for (; beyond; beyond &= beyond - 1) {
                const long term = k + __builtin_ctz(beyond);
                const __m512 value = _mm512_set1_ps(values[term]);
                for (int v = 0; v < VECTORS; v++) {
                    const __m512 weights = _mm512_load_ps(plain + term * PANEL + LANES * v);
                    _mm512_store_ps(tile + LANES * v, _mm512_fmadd_ps(value, weights, _mm512_load_ps(tile + LANES * v)));
                }
            }
        }
    }
}

/* plain (128, 48): rows `first` to `first` + 48 of W at the terms of one block. */
static void plain_block(const Matrix *w, long first, long count, long column, long width, float *plain) {
    memset(plain, 0, BLOCK * PANEL * sizeof *plain);
    for (long n = 0; n < count; n++) {
        _Alignas(64) float row[BLOCK];
        for (int i = 0; i < BLOCK / LANES; i++)
            _mm512_store_ps(row + LANES * i, values_at(w, first + n, column + LANES * i, first_lanes(width - LANES * i)));
        for (long k = 0; k < width; k++) plain[k * PANEL + n] = row[k];
    }
}

/* One block of a panel: rows `first` to `first` + 48 of W, the sum along its columns. codes (64, 48) pairs, scales (48). */
static void panel_of_rows(const Matrix *w, long first, long count, long column, long width, int32_t *codes, float *scales) {
    _Alignas(64) int16_t by_row[PANEL][BLOCK];
    __m512 values[BLOCK / LANES];
    for (int n = 0; n < PANEL; n++) {
        if (n < count) {
            read_block(w, first + n, column, width, values);
            code_block(values, by_row[n], scales + n);
        } else {
            memset(by_row[n], 0, sizeof by_row[n]);
            scales[n] = 0;
        }
    }
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i places = _mm512_mullo_epi32(lane, _mm512_set1_epi32(PAIRS));
    for (int v = 0; v < VECTORS; v++)
        for (int pair = 0; pair < PAIRS; pair++)
            _mm512_store_si512(codes + pair * PANEL + LANES * v,
                               _mm512_i32gather_epi32(places, (const int32_t *)by_row[LANES * v] + pair, 4));
}

/* One block of a panel: columns `first` to `first` + 48 of W, the sum along its rows. */
static void panel_of_columns(const Matrix *w, long first, long count, long row, long height, int32_t *codes, float *scales) {
    for (int v = 0; v < VECTORS; v++) {
        const long column = first + LANES * v;
        const __mmask16 mask = first_lanes(count - LANES * v);
        __m512 largest = _mm512_setzero_ps(), spoiled = largest, scale;
        for (long n = 0; n < height; n++) {
            const __m512 values = values_at(w, row + n, column, mask);
            prefetch(w, row + n + BLOCK, column); /* rows lie too far apart for the CPU to see them coming */
            largest = _mm512_max_ps(largest, _mm512_abs_ps(values));
            spoiled = _mm512_fmadd_ps(values, _mm512_setzero_ps(), spoiled);
        }
        const __m512 factor = factors(largest, spoiled, &scale);
        _mm512_store_ps(scales + LANES * v, scale);
        for (long pair = 0; pair < PAIRS; pair++) {
            const __m512 low = 2 * pair < height ? values_at(w, row + 2 * pair, column, mask) : _mm512_setzero_ps();
            const __m512 high = 2 * pair + 1 < height ? values_at(w, row + 2 * pair + 1, column, mask) : _mm512_setzero_ps();
            const __m512i lower = _mm512_cvtps_epi32(_mm512_mul_ps(low, factor));
            const __m512i upper = _mm512_cvtps_epi32(_mm512_mul_ps(high, factor));
            _mm512_store_si512(codes + pair * PANEL + LANES * v,
                               _mm512_mask_blend_epi16(0xaaaaaaaa, lower, _mm512_slli_epi32(upper, 16)));
        }
    }
}

/* sums (8, 48) of x codes (8, 128) with w codes (64 pairs, 48). In assembly, as GCC 12 to 14 spill the 24 sums that fit into
   registers, and are then no faster than fp32. */
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
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

/* y (8, 48) += one block's sums times their scales; `fresh` without what y held. */
static inline void add_tile(const int16_t *x, const float *x_scales, const int32_t *w, const float *w_scales, float *y, int fresh) {
    _Alignas(64) int32_t sums[TILE_ROWS * PANEL];
    sum_tile(x, w, sums);
    for (int v = 0; v < VECTORS; v++) {
        const __m512 scales = _mm512_load_ps(w_scales + LANES * v);
        for (int row = 0; row < TILE_ROWS; row++) {
            const int place = row * PANEL + LANES * v;
            const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(x_scales[row]), scales);
            const __m512 before = fresh ? _mm512_setzero_ps() : _mm512_load_ps(y + place);
            _mm512_store_ps(y + place, _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(_mm512_load_si512(sums + place)), before));
        }
    }
}

/* 48 outputs from `first` on, blocks `start` to `stop` of their sums: codes, scales, and the weights themselves where x has outliers. */
typedef struct {
    long first, count, start, stop;
    int32_t *codes;
    float *scales, *plain;
} Panel;

static void make_panel(const Matrix *w, int sums_over_rows, const Coded *x, long begin, long end, const Panel *panel) {
    for (long block = panel->start; block < panel->stop; block++) {
        const long term = block * BLOCK, size = least(x->columns - term, BLOCK), place = block - panel->start;
        int32_t *codes = panel->codes + place * PAIRS * PANEL;
        float *scales = panel->scales + place * PANEL;
        if (sums_over_rows)
            panel_of_columns(w, panel->first, panel->count, term, size, codes, scales);
        else
            panel_of_rows(w, panel->first, panel->count, term, size, codes, scales);
        if (has_outliers(x, block, begin, end))
            plain_block(w, panel->first, panel->count, term, size, panel->plain + place * BLOCK * PANEL);
    }
}

/* sums (64, 48) of the rows `top` to `bottom` of x. */
static void multiply_rows(const Coded *x, long top, long bottom, const Panel *panel, float *sums) {
    for (long block = panel->start; block < panel->stop; block++)
        for (long row = top; row < bottom; row += TILE_ROWS) {
            const long at = block * x->height + row, place = block - panel->start;
            float *tile = sums + (row - top) * PANEL;
            add_tile(x->codes + at * BLOCK, x->scales + at, panel->codes + place * PAIRS * PANEL, panel->scales + place * PANEL,
                     tile, place == 0);
            if (has_outliers(x, block, row, row + TILE_ROWS))
                add_outliers(x, row, block, panel->plain + place * BLOCK * PANEL, tile);
        }
}

/* y (rows, count) = sums, or += with `add`. Whole lines go past the caches: reading them first would be a tenth of a product. */
static void write_rows(const float *sums, long rows, long count, float *y, long y_stride, int add) {
    const int past = !add && count == PANEL && (uintptr_t)y % 64 == 0 && y_stride % LANES == 0;
    for (long row = 0; row < rows; row++, sums += PANEL, y += y_stride) {
        for (int v = 0; v < VECTORS; v++) {
            const __mmask16 mask = first_lanes(count - LANES * v);
            __m512 value = _mm512_load_ps(sums + LANES * v);
            if (add) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, y + LANES * v));
            if (past)
                _mm512_stream_ps(y + LANES * v, value);
            else
                _mm512_mask_storeu_ps(y + LANES * v, mask, value);
        }
    }
}

/* y (rows, outputs) = x W^T, or x W with `sums_over_rows`; `add` adds to what y holds. A unit of work is a panel for some rows. */
typedef struct {
    const Matrix *w;
    const Coded *x;
    int sums_over_rows, add;
    long outputs, panels, part_rows, y_stride;
    float *y;
} Product;

/* The part of one unit's sums that `panel` says. */
static void multiply_unit(const Product *product, long unit, Panel *panel, float *sums) {
    const Coded *x = product->x;
    const long begin = unit / product->panels * product->part_rows, end = least(x->rows, begin + product->part_rows);
    if (begin >= end) return;
    panel->first = unit % product->panels * PANEL;
    panel->count = least(product->outputs - panel->first, PANEL);
    make_panel(product->w, product->sums_over_rows, x, begin, end, panel);
    for (long top = begin; top < end; top += ROWS_AT_ONCE) {
        const long bottom = least(end, top + ROWS_AT_ONCE);
        float *y = product->y + top * product->y_stride + panel->first;
        multiply_rows(x, top, bottom, panel, sums);
        write_rows(sums, bottom - top, panel->count, y, product->y_stride, product->add || panel->start);
    }
}

int supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

/* x (rows, columns) in fp32 → codes, scales and limits, of the shapes that `Coded` has. */
void quantize(const float *values, long rows, long columns, long stride, int16_t *codes, float *scales, float *limits,
              int threads) {
    const Coded x = {{values, FP32, stride}, rows, columns, padded(rows), codes, scales, limits};
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < x.height; row++)
        for (long block = 0; block < blocks_of(columns); block++) code_row(&x, row, block);
}

/* y (rows, outputs) = x W^T, or x W with `sums_over_rows`, for W (w_rows, w_columns); `add` adds to what y holds. x is what `quantize`
   was given and has made; limits only without `sums_over_rows`. Returns 0, or -1 where there is no memory for a panel. */
int multiply(const float *values, long rows, long stride, int16_t *codes, float *scales, float *limits, const void *w,
             int dtype, long w_rows, long w_columns, int sums_over_rows, float *y, long y_stride, int add, int threads) {
    const Matrix matrix = {w, dtype, w_columns};
    const long outputs = sums_over_rows ? w_columns : w_rows, terms = sums_over_rows ? w_rows : w_columns;
    const Coded x = {{values, FP32, stride}, rows, terms, padded(rows), codes, scales, limits};
    const long blocks = blocks_of(terms), held = blocks <= WHOLE_SUM ? blocks : PART_OF_SUM;
    const long panels = (outputs + PANEL - 1) / PANEL, row_groups = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    /* Few panels are shared out by their rows too, and many rows are taken in parts; for each a panel is made once more. */
    const long few = (UNITS_PER_THREAD * threads + panels - 1) / panels, many = (rows + MOST_ROWS - 1) / MOST_ROWS;
    const long parts = least(row_groups, few > many ? few : many);
    const long part_rows = (row_groups + parts - 1) / parts * ROWS_AT_ONCE;
    const Product product = {&matrix, &x, sums_over_rows, add, outputs, panels, part_rows, y_stride, y};
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Panel panel = {
            .start = 0,
            .codes = aligned_alloc(64, held * PAIRS * PANEL * sizeof(int32_t)),
            .scales = aligned_alloc(64, held * PANEL * sizeof(float)),
            .plain = limits ? aligned_alloc(64, held * BLOCK * PANEL * sizeof(float)) : NULL,
        };
        float *sums = aligned_alloc(64, ROWS_AT_ONCE * PANEL * sizeof *sums);
        failed = !panel.codes || !panel.scales || !sums || (limits && !panel.plain);
        if (blocks == held) {
            panel.stop = blocks;
#pragma omp for schedule(dynamic) nowait
            for (long unit = 0; unit < panels * parts; unit++)
                if (!failed) multiply_unit(&product, unit, &panel, sums);
        } else {
            /* Each thread goes on with its own units: waiting for the others behind each part of the sums is long where other
               processes use the cores. */
            for (panel.start = 0; panel.start < blocks; panel.start += held) {
                panel.stop = least(blocks, panel.start + held);
#pragma omp for schedule(static, 1) nowait
                for (long unit = 0; unit < panels * parts; unit++)
                    if (!failed) multiply_unit(&product, unit, &panel, sums);
            }
        }
        _mm_sfence(); /* what went past the caches is there for other threads */
        free(panel.codes);
        free(panel.scales);
        free(panel.plain);
        free(sums);
    }
    return failed ? -1 : 0;
}
