/* Products with a frozen matrix in integers, on CPUs that multiply pairs of 16 bits (integer_vectors.h).

   Both factors are cut along the sum into blocks of 128 values. Each block has a scale in fp32 and codes of 13 bits,
   code = round(4095 value / largest of the block), so that a block's sum is exact in 32 bits: 128 * 4095 * 4095 < 2^31.
   Blocks are added up in fp32, in an order that depends neither on the number of rows nor on that of threads. A value that is not
   finite makes its whole block NaN. A block whose largest value is below 1e-30 counts as zero.

   Activations of large models have values that are hundreds of times the others of their block, which would lose their digits. With
   limits, a value of x of more than 32 times the mean magnitude of the rest of its block is left out of the codes, and its products
   are added in fp32: no value of x is then rounded by more than 1/256 of the mean magnitude of its block.

   The matrix is read as it is stored, W (out, in) in fp32, bf16 or fp16, and made into codes a panel of 48 outputs at a time,
   which stay in the cache while all rows are multiplied with them. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "integer_vectors.h"

enum { LARGEST = 4095 };
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

/* So many values from (row, column) on; the other lanes are zero. */
static inline Floats values_at(const Matrix *matrix, long row, long column, long count) {
    const long place = row * matrix->stride + column;
    if (matrix->dtype == FP32) return read_some((const float *)matrix->values + place, count);
    return widened((const uint16_t *)matrix->values + place, count, matrix->dtype == FP16);
}

static inline void prefetch(const Matrix *matrix, long row, long column) {
    const long place = row * matrix->stride + column;
    _mm_prefetch((const char *)matrix->values + place * (matrix->dtype == FP32 ? 4 : 2), _MM_HINT_T0);
}

/* For as many blocks as there are lanes: what their values are multiplied by, and their scales, NaN where `spoiled` is. */
static inline Floats factors(Floats largest, Floats spoiled, Floats *scales) {
    const Where counts = at_least(largest, all(TINY));
    *scales = add(only(counts, times(largest, all(1.0f / LARGEST))), spoiled);
    return only(counts, over(all(LARGEST), largest));
}

/* Codes (128) and scale of one block of values. */
static inline void code_block(const Floats *values, int16_t *codes, float *scale) {
    Floats largest = zeros(), spoiled = zeros(), scales;
    for (int i = 0; i < BLOCK / LANES; i++) {
        largest = greater(largest, magnitude(values[i]));
        spoiled = times_plus(values[i], zeros(), spoiled); /* NaN once a value is not finite */
    }
    const Floats factor = factors(all(greatest(largest)), all(sum(spoiled)), &scales);
    *scale = scales[0];
    for (int i = 0; i < BLOCK / LANES; i++) write_codes(codes + LANES * i, whole(times(values[i], factor)));
}

/* Zero the outliers among `width` finite values; returns the largest magnitude that is left, or infinity where nothing was zeroed. */
static inline float leave_out(Floats *values, long width) {
    float limit = INFINITY;
    for (;;) {
        Floats largest = zeros(), total = zeros();
        for (int i = 0; i < BLOCK / LANES; i++) {
            const Floats magnitudes = magnitude(values[i]);
            largest = greater(largest, magnitudes);
            total = add(total, magnitudes);
        }
        const float most = greatest(largest), rest = sum(total) - most;
        if (limit < INFINITY) limit = most;
        if (!(most * width > OUTLIER * rest) || !(rest < INFINITY) || width <= OUTLIER || most < TINY) return limit;
        limit = most; /* one more round, without it */
        for (int i = 0; i < BLOCK / LANES; i++) values[i] = only(below(magnitude(values[i]), all(most)), values[i]);
    }
}

static inline void read_block(const Matrix *matrix, long row, long column, long width, Floats *values) {
    for (int i = 0; i < BLOCK / LANES; i++)
        values[i] = values_at(matrix, row, column + LANES * i, width - LANES * i);
}

static void code_row(const Coded *x, long row, long block) {
    const long column = block * BLOCK, width = least(x->columns - column, BLOCK), place = block * x->height + row;
    Floats values[BLOCK / LANES];
    read_block(&x->values, row, column, row < x->rows ? width : 0, values);
    if (x->limits) x->limits[place] = leave_out(values, width);
    code_block(values, x->codes + place * BLOCK, x->scales + place);
}

/* Whether rows `row` to `end` have outliers in a block. */
static int has_outliers(const Coded *x, long block, long row, long end) {
    for (; x->limits && row < end; row += LANES) {
        const long count = least(end - row, LANES);
        const Floats limits = read_some(x->limits + block * x->height + row, count);
        if (lanes(below(limits, all(INFINITY))) & ((1u << count) - 1)) return 1;
    }
    return 0;
}

/* tile (8, 48) += the products of what was left out of one block, whose weights are plain (128, 48). */
static void add_outliers(const Coded *x, long row, long block, const float *plain, float *tile) {
    const long column = block * BLOCK, width = least(x->columns - column, BLOCK), place = block * x->height + row;
    for (long r = 0; r < least(TILE_ROWS, x->rows - row); r++, tile += PANEL) {
        if (!(x->limits[place + r] < INFINITY)) continue;
        const float *values = (const float *)x->values.values + (row + r) * x->values.stride + column;
        const Floats limit = all(x->limits[place + r]);
        for (long k = 0; k < width; k += LANES) {
            unsigned beyond = lanes(below(limit, magnitude(read_some(values + k, width - k))));
            for (; beyond; beyond &= beyond - 1) {
                const long term = k + __builtin_ctz(beyond);
                for (int v = 0; v < PANEL; v += LANES)
                    write(tile + v, times_plus(all(values[term]), read(plain + term * PANEL + v), read(tile + v)));
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
            write(row + LANES * i, values_at(w, first + n, column + LANES * i, width - LANES * i));
        for (long k = 0; k < width; k++) plain[k * PANEL + n] = row[k];
    }
}

/* One block of a panel: rows `first` to `first` + 48 of W, the sum along its columns. codes (64, 48) pairs, scales (48). */
static void panel_of_rows(const Matrix *w, long first, long count, long column, long width, int32_t *codes, float *scales) {
    _Alignas(64) int16_t by_row[PANEL][BLOCK];
    Floats values[BLOCK / LANES];
    for (int n = 0; n < PANEL; n++) {
        if (n < count) {
            read_block(w, first + n, column, width, values);
            code_block(values, by_row[n], scales + n);
        } else {
            memset(by_row[n], 0, sizeof by_row[n]);
            scales[n] = 0;
        }
    }
    for (int v = 0; v < PANEL; v += LANES)
        for (int pair = 0; pair < PAIRS; pair++)
            write_column(codes + pair * PANEL + v, (const int32_t *)by_row[v] + pair);
}

/* One block of a panel: columns `first` to `first` + 48 of W, the sum along its rows. */
static void panel_of_columns(const Matrix *w, long first, long count, long row, long height, int32_t *codes, float *scales) {
    for (int v = 0; v < PANEL; v += LANES) {
        const long column = first + v, width = count - v;
        Floats largest = zeros(), spoiled = zeros(), scale;
        for (long n = 0; n < height; n++) {
            const Floats values = values_at(w, row + n, column, width);
            prefetch(w, row + n + BLOCK, column); /* rows lie too far apart for the CPU to see them coming */
            largest = greater(largest, magnitude(values));
            spoiled = times_plus(values, zeros(), spoiled);
        }
        const Floats factor = factors(largest, spoiled, &scale);
        write(scales + v, scale);
        for (long pair = 0; pair < PAIRS; pair++) {
            const Floats low = 2 * pair < height ? values_at(w, row + 2 * pair, column, width) : zeros();
            const Floats high = 2 * pair + 1 < height ? values_at(w, row + 2 * pair + 1, column, width) : zeros();
            write_pairs(codes + pair * PANEL + v, whole(times(low, factor)), whole(times(high, factor)));
        }
    }
}

/* y (8, 48) += one block's sums times their scales; `fresh` without what y held. */
static inline void add_tile(const int16_t *x, const float *x_scales, const int32_t *w, const float *w_scales, float *y, int fresh) {
    _Alignas(64) int32_t sums[TILE_ROWS * PANEL];
    sum_tile(x, w, sums);
    for (int v = 0; v < PANEL; v += LANES)
        for (int row = 0; row < TILE_ROWS; row++) {
            float *place = y + row * PANEL + v;
            const Floats scale = times(all(x_scales[row]), read(w_scales + v));
            write(place, times_plus(scale, fractions(sums + row * PANEL + v), fresh ? zeros() : read(place)));
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
static void write_rows(const float *sums, long rows, long count, float *y, long y_stride, int add_to) {
    const int past = !add_to && count == PANEL && (uintptr_t)y % 64 == 0 && y_stride % LANES == 0;
    for (long row = 0; row < rows; row++, sums += PANEL, y += y_stride) {
        for (int v = 0; v < PANEL; v += LANES) {
            Floats value = read(sums + v);
            if (add_to) value = add(value, read_some(y + v, count - v));
            if (past)
                write_past(y + v, value);
            else
                write_some(y + v, count - v, value);
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
