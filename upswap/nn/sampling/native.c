/* Reading a map at the points of a DySample, and the gradients of that, in float32 on a CPU: what native.py calls.
 *
 * Compiled alone, without any header of torch or Python. Bilinear, border clamped. A row of outputs is placed first: where each
 * point of each group reads, and with which shares. In channels_last the channels of a point are then summed as vectors. In
 * planes ("planar", NCHW) four points of a channel are read at once, as pairs of neighbours.
 */
#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX__
#include <immintrin.h>
#endif

/* The fields are those of `_Call` in native.py, in the same order. Strides are in elements. */
typedef struct {
    const float *x;       /* channels_last; forward, where planar: contiguous */
    const float *field;   /* offsets (N, 2 * G * cells_y * cells_x, h / cells_y, w / cells_x), across before down */
    const float *rows;    /* (h,) base positions in source pixels */
    const float *columns; /* (w,) */
    float *out;           /* forward: the output. backward: the gradient of it, that is read */
    float *of_x;          /* backward: channels_last, of zeros; null where it is not wanted */
    float *of_field;      /* backward: (parts, *field.shape) */
    float *scratch;       /* threads times upswap_scratch() numbers */
    int64_t field_strides[4], of_field_strides[5];
    int64_t images, height, width, channels, groups, target_height, target_width, cells_y, cells_x;
    int64_t planar;       /* whether out is contiguous, not channels_last */
    int64_t slices;       /* backward: of channels, that are summed alone: a divisor of groups, or a multiple that divides channels */
    float gain;           /* what offsets are multiplied by to be source pixels */
} Call;

/* Where the points of one output row read, for each group in turn: w numbers each. */
typedef struct {
    float *across, *down;     /* the share of the right and of the lower neighbour; NaN where the offset is */
    float *of_across, *of_down; /* gain, or 0 where the border stopped the point; later the gradient of the offset */
    int32_t *at;              /* the pixel up left of the point */
    int32_t *right, *lower;   /* how many floats further its neighbours are; 0 on the last column and row */
    int32_t *edge;            /* planar: for each group, how many points the border stopped there, and which */
    float *tile;              /* planar, backward: the gradient of SPAN points, all channels of each side by side */
} Row;

/* With a constant number of channels the loops over them are none: half of the time where groups are short. */
#define INLINED static inline __attribute__((always_inline))

enum { ROWS = 2, SPAN = 64, LANES = 8, PAD = 48 };

/* Outputs of so many bytes are written past the cache, which could not hold them. */
static const int64_t STREAMED = 1 << 25;

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef double d2 __attribute__((vector_size(16), aligned(8), may_alias));
typedef double d1 __attribute__((aligned(4), may_alias));
#if defined(__clang__)
#define SHUFFLED(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t i4 __attribute__((vector_size(16)));
#define SHUFFLED(a, b, i, j, k, l) __builtin_shuffle(a, b, (i4){i, j, k, l})
#endif

/* Arrays of a row start at different places within 4096 bytes: a processor takes others for the same while they are written. */
static int64_t of_row(const Call *c) { return (c->target_width * c->groups + 15) / 16 * 16 + PAD; }
static int64_t of_tile(const Call *c) { return (SPAN * c->channels + 15) / 16 * 16; }
int64_t upswap_scratch(const Call *c) { return ROWS * 8 * of_row(c) + of_tile(c); }

static Row row_at(const Call *c, float *scratch)
{
    const int64_t n = of_row(c);
    int32_t *whole = (int32_t *)(scratch + 4 * n);
    return (Row){scratch, scratch + n, scratch + 2 * n, scratch + 3 * n, whole, whole + n, whole + 2 * n, whole + 3 * n, 0};
}

static float clamped(float p, float most) { return p < 0 ? 0 : p > most ? most : p; } /* NaN stays */

/* Offsets of a row from a field in channels_last, in the order of its memory. */
INLINED void read_pixels(const Row *r, const float *field, int64_t down, int64_t step, int64_t w, int64_t groups, int64_t cells, const int64_t sx)
{
    for (int64_t j = 0; j < w / sx; j++)
        for (int64_t g = 0; g < groups; g++) {
            const float *p = field + j * step + g * cells;
            float *across = r->across + g * w + j * sx, *downwards = r->down + g * w + j * sx;
            if (sx == 2) {
                *(d1 *)across = *(const d1 *)p;
                *(d1 *)downwards = *(const d1 *)(p + down);
            } else
                for (int64_t i = 0; i < sx; i++) {
                    across[i] = p[i];
                    downwards[i] = p[down + i];
                }
        }
}

/* Place output row y of image n, groups first to last. The pixel up left is at most `last_column`, `last_row`. */
static void place(const Call *c, int64_t n, int64_t y, int64_t first, int64_t last, int32_t last_column, int32_t last_row, const Row *r)
{
    const int64_t w = c->target_width, sx = c->cells_x, cells = c->cells_y * sx, *s = c->field_strides;
    const int64_t down = c->groups * cells * s[1];
    const float *field = c->field + n * s[0] + (y / c->cells_y) * s[2] + (first * cells + (y % c->cells_y) * sx) * s[1];
    if (s[1] == 1 && sx == 2)
        read_pixels(r, field, down, s[3], w, last - first, cells, 2);
    else if (s[1] == 1)
        read_pixels(r, field, down, s[3], w, last - first, cells, sx);
    else
        for (int64_t g = 0; g < last - first; g++)
            for (int64_t i = 0; i < sx; i++)
                for (int64_t j = 0; j < w / sx; j++) {
                    const float *p = field + j * s[3] + (g * cells + i) * s[1];
                    r->across[g * w + j * sx + i] = p[0];
                    r->down[g * w + j * sx + i] = p[down];
                }
    const float gain = c->gain, row = c->rows[y], most_x = (float)(c->width - 1), most_y = (float)(c->height - 1);
    const int32_t W = (int32_t)c->width, H = (int32_t)c->height, C = (int32_t)c->channels;
    for (int64_t g = 0; g < last - first; g++) {
        float *across = r->across + g * w, *down_ = r->down + g * w, *of_across = r->of_across + g * w, *of_down = r->of_down + g * w;
        int32_t *at = r->at + g * w, *right = r->right + g * w, *lower = r->lower + g * w;
        const float *columns = c->columns;
        #pragma omp simd
        for (int64_t j = 0; j < w; j++) {
            float px = columns[j] + gain * across[j], py = row + gain * down_[j];
            of_across[j] = px > 0 && px < most_x ? gain : 0;
            of_down[j] = py > 0 && py < most_y ? gain : 0;
            px = clamped(px, most_x);
            py = clamped(py, most_y);
            int32_t ix = (int32_t)(px == px ? px : 0), iy = (int32_t)(py == py ? py : 0);
            ix = ix < last_column ? ix : last_column;
            iy = iy < last_row ? iy : last_row;
            across[j] = px - (float)ix;
            down_[j] = py - (float)iy;
            at[j] = iy * W + ix;
            right[j] = ix < W - 1 ? C : 0;
            lower[j] = iy < H - 1 ? W * C : 0;
        }
    }
}

/* The shares of a point's four pixels; those of pixels that are not read are exactly 0. */
typedef struct { float a, b, c, d; } Shares;

static inline Shares shares(float x, float y)
{
    const float d = x * y, b = x - d, c = y - d;
    return (Shares){1 - x - c, b, c, d};
}

INLINED void blend(const float *p, int64_t right, int64_t lower, Shares s, float *o, int64_t channels, int streamed)
{
    const float *q = p + right, *u = p + lower, *v = u + right;
    int64_t k = 0;
#ifdef __AVX__
    if (streamed)
        for (; k + LANES <= channels; k += LANES)
            _mm256_stream_ps(o + k, (__m256)(s.a * *(const v8 *)(p + k) + s.b * *(const v8 *)(q + k) + s.c * *(const v8 *)(u + k) + s.d * *(const v8 *)(v + k)));
#else
    (void)streamed;
#endif
    for (; k + LANES <= channels; k += LANES)
        *(v8 *)(o + k) = s.a * *(const v8 *)(p + k) + s.b * *(const v8 *)(q + k) + s.c * *(const v8 *)(u + k) + s.d * *(const v8 *)(v + k);
    for (; k < channels; k++) o[k] = s.a * p[k] + s.b * q[k] + s.c * u[k] + s.d * v[k];
}

/* Some rows of an image, two columns at a time: points beside and below each other read the same pixels. */
INLINED void forward_last_of(const Call *c, int64_t n, int64_t y, int rows, const Row *r, const int streamed, const int64_t K)
{
    const int64_t C = c->channels, G = c->groups, w = c->target_width;
    const float *image = c->x + n * c->height * c->width * C;
    float *out = c->out + (n * c->target_height + y) * w * C;
    for (int64_t from = 0; from < w; from += 2)
        for (int z = 0; z < rows; z++)
            for (int64_t j = from; j < (from + 2 < w ? from + 2 : w); j++)
                for (int64_t g = 0; g < G; g++) {
                    const int64_t i = g * w + j;
                    blend(image + r[z].at[i] * C + g * K, r[z].right[i], r[z].lower[i], shares(r[z].across[i], r[z].down[i]), out + (z * w + j) * C + g * K, K, streamed);
                }
}

static void forward_last(const Call *c, int64_t n, int64_t y, int rows, const Row *r, int streamed)
{
    const int64_t K = c->channels / c->groups;
    if (K == 16 && streamed)
        forward_last_of(c, n, y, rows, r, 1, 16);
    else if (K == 16)
        forward_last_of(c, n, y, rows, r, 0, 16);
    else
        forward_last_of(c, n, y, rows, r, streamed, K);
}

static inline v4 pairs(const float *p, const float *q) { return (v4)(d2){*(const d1 *)p, *(const d1 *)q}; }

/* The points that the border stopped right or below: there the left or upper pixel must not matter, were it infinite. */
static int32_t find_edges(const float *across, const float *down, int64_t w, int32_t *edge)
{
    int32_t edges = 0;
    for (int64_t j = 0; j < w; j++) {
        edge[edges] = (int32_t)j;
        edges += across[j] == 1 || down[j] == 1;
    }
    return edges;
}

/* Four points of one channel: each row of a point's pixels is read as a pair of neighbours. */
INLINED v4 four(const float *p, const int32_t *at, int64_t W, v4 a, v4 b, v4 c, v4 d)
{
    const float *i = p + at[0], *ii = p + at[1], *iii = p + at[2], *iv = p + at[3];
    const v4 first = pairs(i, ii), second = pairs(iii, iv), third = pairs(i + W, ii + W), fourth = pairs(iii + W, iv + W);
    return a * SHUFFLED(first, second, 0, 2, 4, 6) + b * SHUFFLED(first, second, 1, 3, 5, 7) + c * SHUFFLED(third, fourth, 0, 2, 4, 6) + d * SHUFFLED(third, fourth, 1, 3, 5, 7);
}

/* A row of outputs of two channels, of p and of p + further, in planes of at least 2 x 2 pixels. */
static void forward_line(const float *p, int64_t further, int64_t W, int64_t w, const Row *r, int64_t g, int32_t edges, float *o, int64_t o_further)
{
    const float *across = r->across + g * w, *down = r->down + g * w;
    const int32_t *at = r->at + g * w, *edge = r->edge + g * w;
    int64_t j = 0;
    for (; j + 4 <= w; j += 4) {
        const v4 x = *(const v4 *)(across + j), y = *(const v4 *)(down + j), d = x * y, b = x - d, c = y - d, a = 1 - x - c;
        const v4 one = four(p, at + j, W, a, b, c, d), other = four(p + further, at + j, W, a, b, c, d);
        *(v4 *)(o + j) = one;
        *(v4 *)(o + o_further + j) = other;
    }
    for (int64_t e = 0; e < edges + w - j; e++) {
        const int64_t there = e < edges ? edge[e] : j + e - edges;
        const int64_t right = across[there] != 1, lower = down[there] != 1 ? W : 0;
        const float *i = p + at[there] + !right + (W - lower), *ii = i + further;
        const Shares s = shares(right ? across[there] : 0, lower ? down[there] : 0);
        o[there] = s.a * i[0] + s.b * i[right] + s.c * i[lower] + s.d * i[lower + right];
        o[o_further + there] = s.a * ii[0] + s.b * ii[right] + s.c * ii[lower] + s.d * ii[lower + right];
    }
}

/* Some rows of an image, plane by plane: what rows below each other read stays in the first cache. */
static void forward_planar(const Call *c, int64_t n, int64_t y, int rows, const Row *r)
{
    const int64_t G = c->groups, K = c->channels / G, W = c->width, w = c->target_width;
    const int64_t source = c->height * W, target = c->target_height * w;
    for (int64_t g = 0; g < G; g++) {
        int32_t edges[ROWS];
        for (int z = 0; z < rows; z++) edges[z] = find_edges(r[z].across + g * w, r[z].down + g * w, w, r[z].edge + g * w);
        const int64_t first = n * c->channels + g * K;
        for (int64_t k = first; k < first + K; k += 2) {
            const int64_t another = k + 1 < first + K; /* the last of an odd number is its own neighbour */
            for (int z = 0; z < rows; z++)
                forward_line(c->x + k * source, another * source, W, w, r + z, g, edges[z], c->out + k * target + (y + z) * w, another * target);
        }
    }
}

/* to[j * to_step + i] = from[i * from_step + j] */
static void transpose(const float *from, int64_t from_step, int64_t rows, int64_t columns, float *to, int64_t to_step)
{
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
        int64_t j = 0;
        for (; j + 4 <= columns; j += 4) {
            const float *p = from + i * from_step + j;
            float *q = to + j * to_step + i;
            const v4 a = *(const v4 *)p, b = *(const v4 *)(p + from_step), c = *(const v4 *)(p + 2 * from_step), d = *(const v4 *)(p + 3 * from_step);
            const v4 e = SHUFFLED(a, b, 0, 4, 1, 5), f = SHUFFLED(a, b, 2, 6, 3, 7), g = SHUFFLED(c, d, 0, 4, 1, 5), h = SHUFFLED(c, d, 2, 6, 3, 7);
            *(v4 *)q = SHUFFLED(e, g, 0, 1, 4, 5);
            *(v4 *)(q + to_step) = SHUFFLED(e, g, 2, 3, 6, 7);
            *(v4 *)(q + 2 * to_step) = SHUFFLED(f, h, 0, 1, 4, 5);
            *(v4 *)(q + 3 * to_step) = SHUFFLED(f, h, 2, 3, 6, 7);
        }
        for (; j < columns; j++)
            for (int64_t k = i; k < i + 4; k++) to[j * to_step + k] = from[k * from_step + j];
    }
    for (; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) to[j * to_step + i] = from[i * from_step + j];
}

/* The two halves of the lanes, added. */
static inline v4 halved(const v8 *v) { return ((const v4 *)v)[0] + ((const v4 *)v)[1]; }

/* What the lanes of each add up to. */
static inline v4 sums(v8 a, v8 b, v8 c, v8 d)
{
    const v4 e = halved(&a), f = halved(&b), g = halved(&c), h = halved(&d);
    const v4 i = SHUFFLED(e, f, 0, 4, 1, 5) + SHUFFLED(e, f, 2, 6, 3, 7), j = SHUFFLED(g, h, 0, 4, 1, 5) + SHUFFLED(g, h, 2, 6, 3, 7);
    return SHUFFLED(i, j, 0, 1, 4, 5) + SHUFFLED(i, j, 2, 3, 6, 7);
}

/* Add the gradient t of point i to those of the four pixels it read, at `of_x`; and the gradient of its offset. */
INLINED void spread(const Row *r, int64_t i, const float *p, float *of_x, const float *t, int64_t channels)
{
    const int64_t right = r->right[i], lower = r->lower[i];
    const float x = r->across[i], y = r->down[i], *q = p + right, *u = p + lower, *v = u + right;
    const Shares s = shares(x, y);
    v8 a = {0}, b = {0}, c = {0}, d = {0};
    int64_t k = 0;
    /* One after the other: on the last column and row they are the same pixel. */
    for (; k + LANES <= channels; k += LANES) {
        const v8 g = *(const v8 *)(t + k);
        a += g * *(const v8 *)(p + k);
        b += g * *(const v8 *)(q + k);
        c += g * *(const v8 *)(u + k);
        d += g * *(const v8 *)(v + k);
        if (!of_x) continue;
        *(v8 *)(of_x + k) += s.a * g;
        *(v8 *)(of_x + right + k) += s.b * g;
        *(v8 *)(of_x + lower + k) += s.c * g;
        *(v8 *)(of_x + lower + right + k) += s.d * g;
    }
    const v4 of_lanes = sums(a, b, c, d);
    float pa = of_lanes[0], pb = of_lanes[1], pc = of_lanes[2], pd = of_lanes[3];
    for (; k < channels; k++) {
        pa += t[k] * p[k];
        pb += t[k] * q[k];
        pc += t[k] * u[k];
        pd += t[k] * v[k];
        if (!of_x) continue;
        of_x[k] += s.a * t[k];
        of_x[right + k] += s.b * t[k];
        of_x[lower + k] += s.c * t[k];
        of_x[lower + right + k] += s.d * t[k];
    }
    r->of_across[i] *= (1 - y) * (pb - pa) + y * (pd - pc);
    r->of_down[i] *= (1 - x) * (pc - pa) + x * (pd - pb);
}

/* Row y of an image, for the channels of one slice: some whole groups, or one part of a group, of K channels. */
INLINED void backward_row_of(const Call *c, int64_t n, int64_t y, int64_t slice, const Row *r, const int64_t K)
{
    const int64_t C = c->channels, G = c->groups, w = c->target_width, plane = c->target_height * w;
    const int64_t parts = c->slices > G ? c->slices / G : 1, groups = c->slices > G ? 1 : G / c->slices;
    const int64_t first = slice * groups / parts, start = slice * (C / c->slices);
    const int64_t image = n * c->height * c->width * C + start;
    place(c, n, y, first, first + groups, (int32_t)c->width - 1, (int32_t)c->height - 1, r);
    for (int64_t from = 0; from < w; from += SPAN) {
        const int64_t to = from + SPAN < w ? from + SPAN : w;
        const float *grad = c->out + (n * plane + y * w + from) * C + start;
        int64_t step = C;
        if (c->planar) {
            transpose(c->out + (n * C + start) * plane + y * w + from, plane, C / c->slices, to - from, r->tile, C / c->slices);
            grad = r->tile;
            step = C / c->slices;
        }
        for (int64_t j = from; j < to; j++)
            for (int64_t g = 0; g < groups; g++) {
                const int64_t pixel = image + r->at[g * w + j] * C + g * K;
                spread(r, g * w + j, c->x + pixel, c->of_x ? c->of_x + pixel : 0, grad + (j - from) * step + g * K, K);
            }
    }
    const int64_t sx = c->cells_x, cells = c->cells_y * sx, *s = c->of_field_strides, down = G * cells * s[2];
    float *of_field = c->of_field + (slice % parts) * s[0] + n * s[1] + (first * cells + (y % c->cells_y) * sx) * s[2] + (y / c->cells_y) * s[3];
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = 0; i < sx; i++)
            for (int64_t j = 0; j < w / sx; j++) {
                float *p = of_field + (g * cells + i) * s[2] + j * s[4];
                p[0] = r->of_across[g * w + j * sx + i];
                p[down] = r->of_down[g * w + j * sx + i];
            }
}

static void backward_row(const Call *c, int64_t n, int64_t y, int64_t slice, const Row *r)
{
    const int64_t K = c->slices > c->groups ? c->channels / c->slices : c->channels / c->groups;
    if (K == 16)
        backward_row_of(c, n, y, slice, r, 16);
    else
        backward_row_of(c, n, y, slice, r, K);
}

/* A number of this text: see compile_native.py. */
int64_t upswap_source(void) { return UPSWAP_SOURCE; }

/* Whether more than one thread may be asked for. */
int upswap_parallel(void)
{
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

static float *own_scratch(const Call *c)
{
#ifdef _OPENMP
    return c->scratch + omp_get_thread_num() * upswap_scratch(c);
#else
    return c->scratch;
#endif
}

void upswap_forward(const Call *c, int threads)
{
    const int64_t together = c->planar ? ROWS : 2, blocks = (c->target_height + together - 1) / together, C = c->channels;
    const int32_t spare = c->planar ? 2 : 1;
    const int aligned = (uintptr_t)c->out % 32 == 0 && C / c->groups % LANES == 0;
    const int streamed = aligned && 4 * c->images * c->target_height * c->target_width * C >= STREAMED;
    (void)threads;
    #pragma omp parallel num_threads(threads)
    {
        float *scratch = own_scratch(c);
        Row r[ROWS];
        for (int z = 0; z < ROWS; z++) r[z] = row_at(c, scratch + z * 8 * of_row(c));
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < c->images * blocks; i++) {
            const int64_t n = i / blocks, y = i % blocks * together, left = c->target_height - y;
            const int rows = (int)(left < together ? left : together);
            for (int z = 0; z < rows; z++)
                place(c, n, y + z, 0, c->groups, (int32_t)c->width - spare, (int32_t)c->height - spare, r + z);
            if (c->planar)
                forward_planar(c, n, y, rows, r);
            else
                forward_last(c, n, y, rows, r, streamed);
        }
#ifdef __AVX__
        _mm_sfence();
#endif
    }
}

/* Each slice of each image is one thread's: the sums are the same in every run. */
void upswap_backward(const Call *c, int threads)
{
    (void)threads;
    #pragma omp parallel num_threads(threads)
    {
        float *scratch = own_scratch(c);
        Row r = row_at(c, scratch);
        r.tile = scratch + ROWS * 8 * of_row(c);
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < c->images * c->slices; i++)
            for (int64_t y = 0; y < c->target_height; y++) backward_row(c, i / c->slices, y, i % c->slices, &r);
    }
}
