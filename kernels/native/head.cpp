// One discriminator's share of the forward and the backward, in closed form (docs/method.md), for one instruction set.
//
// Compiled once for each instruction set, with GSDA_ISA as its namespace. Nothing here may be shared between the two
// object files: no standard library templates, whose instantiations the linker would merge.
#include "head.h"

#include <immintrin.h>

namespace gsda {
namespace GSDA_ISA {
namespace {

#ifdef __AVX512F__
// 24 of 32 registers accumulate.
constexpr int kVectorBytes = 64, kTileRows = 6, kTileVectors = 4, kInnerRows = 3, kInnerUnits = 8;
#else
// 12 of 16 do.
constexpr int kVectorBytes = 32, kTileRows = 3, kTileVectors = 4, kInnerRows = 3, kInnerUnits = 4;
#endif
// Rows of a matrix that stay in the second-level cache while every pair passes over them.
constexpr int64_t kDepthBlock = 64;

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);

template <class T>
inline Vector<T> load(const T *from) {
  return *reinterpret_cast<const Vector<T> *>(from);
}
template <class T>
inline void store(T *to, Vector<T> value) {
  *reinterpret_cast<Vector<T> *>(to) = value;
}
// Past the caches: results that nobody reads before they would have been evicted.
inline void stream(float *to, Vector<float> value) {
#ifdef __AVX512F__
  _mm512_stream_ps(to, (__m512)value);
#else
  _mm256_stream_ps(to, (__m256)value);
#endif
}
inline void stream(double *to, Vector<double> value) {
#ifdef __AVX512F__
  _mm512_stream_pd(to, (__m512d)value);
#else
  _mm256_stream_pd(to, (__m256d)value);
#endif
}

inline float exp_of(float x) { return __builtin_expf(x); }
inline double exp_of(double x) { return __builtin_exp(x); }
inline float log1p_of(float x) { return __builtin_log1pf(x); }
inline double log1p_of(double x) { return __builtin_log1p(x); }

template <class T>
constexpr int64_t padded(int64_t size) {
  return (size + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// ---- Products ----------------------------------------------------------------------------------------------------

template <int N>
struct Size {
  static constexpr int value = N;
};

// Calls `run` with `rows` (1 .. kTileRows) as a compile-time constant.
template <class Run>
inline void with_rows(int64_t rows, Run run) {
  switch (rows) {
  case 1: return run(Size<1>{});
  case 2: return run(Size<2>{});
  case 3: return run(Size<3>{});
#ifdef __AVX512F__
  case 4: return run(Size<4>{});
  case 5: return run(Size<5>{});
  case 6: return run(Size<6>{});
#endif
  }
}

// Cuts `count` rows into tiles of nearly equal height: 39 rows are 7 tiles of 5 or 6, not 6 of 6 and one of 3.
template <int Height, class Run>
inline void for_row_tiles(int64_t count, Run run) {
  const int64_t tiles = (count + Height - 1) / Height;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = count * tile / tiles;
    with_rows(count * (tile + 1) / tiles - first, [&](auto rows) { run(first, rows); });
  }
}

// Cuts `columns`, a multiple of the vector length, into strips of 4, 2 and 1 vectors.
template <class T, class Run>
inline void for_column_strips(int64_t columns, Run run) {
  int64_t first = 0;
  for (; first + kTileVectors * kLanes<T> <= columns; first += kTileVectors * kLanes<T>)
    run(first, Size<kTileVectors>{});
  for (; first + 2 * kLanes<T> <= columns; first += 2 * kLanes<T>) run(first, Size<2>{});
  for (; first < columns; first += kLanes<T>) run(first, Size<1>{});
}

// c[m, :] (+)= sum_k a[m * a_row + k * a_depth] * b[k, :] for M rows and N vectors of columns. Beside its own work it
// fetches one cache line at `soon` from each of the same rows: the hardware's own fetching stops at the end of a page.
template <int M, int N, bool Streaming, class T>
inline void outer_tile(const T *a, int64_t a_row, int64_t a_depth, const T *b, int64_t b_stride, int64_t depth, T *c,
                       int64_t c_stride, bool accumulate, const T *soon) {
  Vector<T> sums[M][N];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      sums[m][n] = accumulate ? load(c + m * c_stride + n * kLanes<T>) : Vector<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(soon + k * b_stride, 0, 2);
    Vector<T> row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = load(b + k * b_stride + n * kLanes<T>);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const Vector<T> factor = Vector<T>{} + a[m * a_row + k * a_depth];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] += factor * row[n];
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      T *to = c + m * c_stride + n * kLanes<T>;
      if constexpr (Streaming) stream(to, sums[m][n]);
      else store(to, sums[m][n]);
    }
}

// c (rows, columns) = a (rows, depth) @ b (depth, columns)
template <class T>
void product(int64_t rows, int64_t columns, int64_t depth, const T *a, int64_t a_stride, const T *b, int64_t b_stride,
             T *c, int64_t c_stride) {
  int64_t from = 0;
  do { // once for a depth of zero, too: a sum over nothing
    const int64_t block = depth - from < kDepthBlock ? depth - from : kDepthBlock;
    for_column_strips<T>(columns, [&](int64_t column, auto vectors) {
      const T *strip = b + from * b_stride + column, *next_strip = strip + vectors.value * kLanes<T>;
      for_row_tiles<kTileRows>(rows, [&](int64_t row, auto tile_rows) {
        outer_tile<tile_rows.value, vectors.value, false>(
            a + row * a_stride + from, a_stride, 1, strip, b_stride, block, c + row * c_stride + column, c_stride,
            from > 0, next_strip + row / kTileRows * kLanes<T>);
      });
    });
    from += kDepthBlock;
  } while (from < depth);
}

// c (rows, columns) = a (depth, rows).T @ b (depth, columns), written once and past the caches: a weight's gradient.
template <class T>
void gradient_product(int64_t rows, int64_t columns, int64_t depth, const T *a, int64_t a_stride, const T *b,
                      int64_t b_stride, T *c, int64_t c_stride) {
  const bool aligned = reinterpret_cast<uintptr_t>(c) % kVectorBytes == 0 && c_stride % kLanes<T> == 0;
  for_row_tiles<kTileRows>(rows, [&](int64_t row, auto tile_rows) {
    for_column_strips<T>(columns, [&](int64_t column, auto vectors) {
      const auto tile = aligned ? outer_tile<tile_rows.value, vectors.value, true, T>
                                : outer_tile<tile_rows.value, vectors.value, false, T>;
      const T *strip = b + column;
      tile(a + row, 1, a_stride, strip, b_stride, depth, c + row * c_stride + column, c_stride, false,
           strip + vectors.value * kLanes<T>);
    });
  });
}

// The sums of four vectors' lanes, written to out[0 .. 3].
inline void sum_lanes(const Vector<float> *v, float *out) {
#ifdef __AVX512F__
  auto halves = [](Vector<float> x) {
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  };
#else
  auto halves = [](Vector<float> x) { return (__m256)x; };
#endif
  const __m256 first = _mm256_hadd_ps(halves(v[0]), halves(v[1])), second = _mm256_hadd_ps(halves(v[2]), halves(v[3]));
  const __m256 quads = _mm256_hadd_ps(first, second);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
}
inline void sum_lanes(const Vector<double> *v, double *out) {
#ifdef __AVX512F__
  auto halves = [](Vector<double> x) {
    return _mm256_add_pd(_mm512_castpd512_pd256((__m512d)x), _mm512_extractf64x4_pd((__m512d)x, 1));
  };
#else
  auto halves = [](Vector<double> x) { return (__m256d)x; };
#endif
  const __m256d first = _mm256_hadd_pd(halves(v[0]), halves(v[1])), second = _mm256_hadd_pd(halves(v[2]), halves(v[3]));
  const __m256d low = _mm256_permute2f128_pd(first, second, 0x20), high = _mm256_permute2f128_pd(first, second, 0x31);
  _mm256_storeu_pd(out, _mm256_add_pd(low, high));
}

// c[m, n] = sum_k a[m, k] * b[n, k] for M rows and N units; depth is a multiple of the vector length. Beside its own
// work it fetches the row at `soon`.
template <int M, int N, class T>
inline void inner_tile(const T *a, int64_t a_stride, const T *b, int64_t b_stride, int64_t depth, T *c,
                       int64_t c_stride, const T *soon) {
  Vector<T> sums[M][N] = {};
  for (int64_t k = 0; k < depth; k += kLanes<T>) {
    __builtin_prefetch(soon + k, 0, 2);
    Vector<T> row[M];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) row[m] = load(a + m * a_stride + k);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vector<T> unit = load(b + n * b_stride + k);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) sums[m][n] += row[m] * unit;
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; n += 4) sum_lanes(sums[m] + n, c + m * c_stride + n);
}

// c (rows, columns) = a (rows, depth) @ b (columns, depth).T; columns and depth are multiples of the vector length.
template <class T>
void transposed_product(int64_t rows, int64_t columns, int64_t depth, const T *a, int64_t a_stride, const T *b,
                        int64_t b_stride, T *c, int64_t c_stride) {
  const auto run = [&](int64_t column, auto units) {
    const T *group = b + column * b_stride, *next_group = group + units.value * b_stride;
    for_row_tiles<kInnerRows>(rows, [&](int64_t row, auto tile_rows) {
      inner_tile<tile_rows.value, units.value>(a + row * a_stride, a_stride, group, b_stride, depth,
                                               c + row * c_stride + column, c_stride,
                                               next_group + row / kInnerRows * b_stride);
    });
  };
  int64_t column = 0;
  for (; column + kInnerUnits <= columns; column += kInnerUnits) run(column, Size<kInnerUnits>{});
  for (; column < columns; column += 4) run(column, Size<4>{});
}

template <class T>
T dot(int64_t size, const T *a, const T *b) {
  Vector<T> sums[4] = {};
  for (int64_t i = 0, n = 0; i < size; i += kLanes<T>, n = (n + 1) % 4) sums[n] += load(a + i) * load(b + i);
  T out[4];
  sum_lanes(sums, out);
  return (out[0] + out[1]) + (out[2] + out[3]);
}

// ---- One discriminator ---------------------------------------------------------------------------------------------

// Parts of the thread's scratch, each a whole number of cache lines.
template <class T>
struct Scratch {
  T *next;
  T *take(int64_t count) {
    T *taken = next;
    next += (count + 15) / 16 * 16;
    return taken;
  }
};

// A discriminator's parameters with rows of whole vectors: the caller's own memory where it is so, else padded copies.
template <class T>
struct Weights {
  const T *w1, *b1, *w2, *b2, *w3;
  int64_t dim, hidden; // padded
};

template <class T>
const T *padded_copy(const T *from, int64_t rows, int64_t columns, int64_t to_rows, int64_t to_columns, T *to) {
  for (int64_t r = 0; r < to_rows; ++r)
    for (int64_t c = 0; c < to_columns; ++c)
      to[r * to_columns + c] = r < rows && c < columns ? from[r * columns + c] : T(0);
  return to;
}

template <class T>
void unpad(const T *from, int64_t from_columns, T *to, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[r * columns + c] = from[r * from_columns + c];
}

template <class T>
Weights<T> weights_of(const Head<T> &head, int64_t k, Scratch<T> &scratch) {
  const int64_t d = head.dim, h = head.hidden, dp = padded<T>(d), hp = padded<T>(h);
  const Weights<T> own{head.w1 + k * h * d, head.b1 + k * h, head.w2 + k * h * h, head.b2 + k * h, head.w3 + k * h,
                       dp,                  hp};
  if (d == dp && h == hp) return own;
  return {padded_copy(own.w1, h, d, hp, dp, scratch.take(hp * dp)), padded_copy(own.b1, 1, h, 1, hp, scratch.take(hp)),
          padded_copy(own.w2, h, h, hp, hp, scratch.take(hp * hp)), padded_copy(own.b2, 1, h, 1, hp, scratch.take(hp)),
          padded_copy(own.w3, 1, h, 1, hp, scratch.take(hp)),       dp,
          hp};
}

template <class T>
int64_t scratch_size(const Head<T> &head, int64_t most_pairs) {
  const int64_t dp = padded<T>(head.dim), hp = padded<T>(head.hidden);
  return 3 * most_pairs * head.dim_stride + 4 * most_pairs * head.hidden_stride + 3 * most_pairs // pairs
         + 2 * (hp * dp + hp * hp) + 8 * hp + 16 * 24;                                            // padded copies
}

template <class T>
const T *gather(const Head<T> &head, int64_t first, int64_t count, Scratch<T> &scratch) {
  T *to = scratch.take(count * head.dim_stride);
  for (int64_t i = 0; i < count; ++i) {
    const T *from = head.features + head.rows[first + i] * head.dim;
    T *row = to + i * head.dim_stride;
    __builtin_memcpy(row, from, head.dim * sizeof(T));
    for (int64_t c = head.dim; c < head.dim_stride; ++c) row[c] = T(0);
  }
  return to;
}

// x = relu(x + bias). A NaN stays one.
template <class T>
void add_bias_and_rectify(int64_t rows, int64_t columns, const T *bias, T *x, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      const Vector<T> value = load(x + i * stride + c) + load(bias + c);
      store(x + i * stride + c, value < T(0) ? Vector<T>{} : value);
    }
}

// x = values where the activation is on, else 0.
template <class T>
void mask(int64_t rows, int64_t columns, const T *activation, const T *values, int64_t values_stride, T *x,
          int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < columns; c += kLanes<T>)
      store(x + i * stride + c,
            load(activation + i * stride + c) > T(0) ? load(values + i * values_stride + c) : Vector<T>{});
}

template <class T>
void forward(const Head<T> &head, int64_t k, T *memory) {
  Scratch<T> scratch{memory};
  const int64_t first = head.offsets[k], n = head.offsets[k + 1] - first, hs = head.hidden_stride, ds = head.dim_stride;
  const Weights<T> own = weights_of(head, k, scratch);
  const int64_t dim = own.dim, hidden = own.hidden;
  const T *x = gather(head, first, n, scratch);
  T *h1 = head.h1 ? head.h1 + first * hs : scratch.take(n * hs);
  T *h2 = head.h2 ? head.h2 + first * hs : scratch.take(n * hs);
  T *u1 = head.u1 ? head.u1 + first * hs : scratch.take(n * hs);
  T *u2 = scratch.take(n * hs);
  T *jacobian = head.jacobian + first * ds;

  transposed_product(n, hidden, dim, x, ds, own.w1, dim, h1, hs);
  add_bias_and_rectify(n, hidden, own.b1, h1, hs);
  transposed_product(n, hidden, hidden, h1, hs, own.w2, hidden, h2, hs);
  add_bias_and_rectify(n, hidden, own.b2, h2, hs);
  mask(n, hidden, h2, own.w3, int64_t(0), u2, hs);
  product(n, hidden, hidden, u2, hs, own.w2, hidden, u1, hs);
  mask(n, hidden, h1, u1, hs, u1, hs);
  product(n, dim, hidden, u1, hs, own.w1, dim, jacobian, ds);

  double loss = 0, gradient_norm = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t sample = head.rows[first + i];
    const T weight = head.weight[sample * head.num_discriminators + k];
    const T logit = dot(hidden, h2 + i * hs, own.w3) + head.b3[k];
    const T signed_logit = (1 - 2 * head.label[sample]) * logit;
    // |sigmoid(z) - label| = sigmoid((1 - 2 label) z), and BCE = softplus of the same: no cancellation.
    const T small = exp_of(signed_logit > 0 ? -signed_logit : signed_logit);
    const T residual = (signed_logit > 0 ? T(1) : small) / (1 + small);
    const T norm = __builtin_sqrt(dot(dim, jacobian + i * ds, jacobian + i * ds));
    head.residual[first + i] = residual;
    head.norm[first + i] = norm;
    loss += weight * ((signed_logit > 0 ? signed_logit : T(0)) + log1p_of(small));
    gradient_norm += weight * residual * norm;
  }
  head.loss[k] = T(loss / head.num_samples);
  head.gradient_norm[k] = T(gradient_norm / head.num_samples);
}

template <class T>
void backward(const Head<T> &head, int64_t k, T *memory) {
  Scratch<T> scratch{memory};
  const int64_t first = head.offsets[k], n = head.offsets[k + 1] - first, hs = head.hidden_stride, ds = head.dim_stride;
  const T *jacobian = head.jacobian + first * ds;

  T *dz = scratch.take(n), *direction = scratch.take(n), sum_dz = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t sample = head.rows[first + i];
    const T share = head.weight[sample * head.num_discriminators + k] / head.num_samples;
    const T sign = 1 - 2 * head.label[sample], residual = head.residual[first + i], norm = head.norm[first + i];
    const T of_loss = share * head.grad_loss[k] * sign * residual;
    const T of_norm = share * head.grad_gradient_norm[k] * sign * residual * (1 - residual) * norm;
    head.feature_coefficient[first + i] = head.loss_feature_scale * of_loss + of_norm;
    dz[i] = of_loss + of_norm;
    sum_dz += dz[i];
    // d norm / d jacobian, with the subgradient 0 where the jacobian vanishes.
    direction[i] = norm == 0 ? T(0) : share * head.grad_gradient_norm[k] * residual / norm;
  }
  if (!head.h1) return; // the discriminators are frozen

  const Weights<T> own = weights_of(head, k, scratch);
  const int64_t dim = own.dim, hidden = own.hidden, h = head.hidden, d = head.dim;
  const bool aligned = dim == d && hidden == h;
  const T *h1 = head.h1 + first * hs, *h2 = head.h2 + first * hs, *u1 = head.u1 + first * hs;
  T *q = scratch.take(n * ds);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < dim; c += kLanes<T>) store(q + i * ds + c, direction[i] * load(jacobian + i * ds + c));

  if (head.grad_w1) {
    const T *x = gather(head, first, n, scratch);
    T *both = scratch.take(n * ds);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < dim; c += kLanes<T>)
        store(both + i * ds + c, dz[i] * load(x + i * ds + c) + load(q + i * ds + c));
    T *to = aligned ? head.grad_w1 + k * h * d : scratch.take(hidden * dim);
    gradient_product(hidden, dim, n, u1, hs, both, ds, to, dim);
    if (!aligned) unpad(to, dim, head.grad_w1 + k * h * d, h, d);
  }
  T *row = scratch.take(hidden); // a gradient (H,) with its padding
  if (head.grad_b1) {
    product(1, hidden, n, dz, n, u1, hs, row, hidden);
    unpad(row, hidden, head.grad_b1 + k * h, 1, h);
  }
  if (head.grad_b3) head.grad_b3[k] = sum_dz;
  if (!head.grad_b2 && !head.grad_w2 && !head.grad_w3) return;

  T *u2 = scratch.take(n * hs), *g1 = scratch.take(n * hs);
  mask(n, hidden, h2, own.w3, int64_t(0), u2, hs);
  if (head.grad_b2) {
    product(1, hidden, n, dz, n, u2, hs, row, hidden);
    unpad(row, hidden, head.grad_b2 + k * h, 1, h);
  }
  if (!head.grad_w2 && !head.grad_w3) return;

  // Without a gradient to the norm, q and all that follows from it is zero.
  const bool has_norm = head.grad_gradient_norm[k] != 0;
  if (has_norm) {
    transposed_product(n, hidden, dim, q, ds, own.w1, dim, g1, hs);
    mask(n, hidden, h1, g1, hs, g1, hs);
  }
  if (head.grad_w3) {
    product(1, hidden, n, dz, n, h2, hs, row, hidden);
    if (has_norm) {
      T *g2 = scratch.take(n * hs);
      transposed_product(n, hidden, hidden, g1, hs, own.w2, hidden, g2, hs);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < hidden; c += kLanes<T>)
          store(row + c, load(row + c) + (load(h2 + i * hs + c) > T(0) ? load(g2 + i * hs + c) : Vector<T>{}));
    }
    unpad(row, hidden, head.grad_w3 + k * h, 1, h);
  }
  if (head.grad_w2) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < hidden; c += kLanes<T>) {
        const Vector<T> of_logit = dz[i] * load(h1 + i * hs + c);
        store(g1 + i * hs + c, has_norm ? of_logit + load(g1 + i * hs + c) : of_logit);
      }
    T *to = aligned ? head.grad_w2 + k * h * h : scratch.take(hidden * hidden);
    gradient_product(hidden, hidden, n, u2, hs, g1, hs, to, hidden);
    if (!aligned) unpad(to, hidden, head.grad_w2 + k * h * h, h, h);
  }
}

} // namespace

extern const Code<float> code_float{scratch_size<float>, forward<float>, backward<float>};
extern const Code<double> code_double{scratch_size<double>, forward<double>, backward<double>};

} // namespace GSDA_ISA
} // namespace gsda
