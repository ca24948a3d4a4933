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
  typedef uint8_t bytes __attribute__((vector_size(kVectorBytes / sizeof(T)), aligned(1), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);

template <class T>
constexpr T kLargest = sizeof(T) == 4 ? T(__FLT_MAX__) : T(__DBL_MAX__);

template <class T>
inline Vector<T> load(const T *from) {
  return *reinterpret_cast<const Vector<T> *>(from);
}
template <class T>
inline void store(T *to, Vector<T> value) {
  *reinterpret_cast<Vector<T> *>(to) = value;
}
// A mask of a vector's lanes as bytes, 0 or 1.
template <class T>
using Bytes = typename VectorOf<T>::bytes;
template <class T>
inline Vector<T> load_mask(const uint8_t *from) {
  return __builtin_convertvector(*reinterpret_cast<const Bytes<T> *>(from), Vector<T>);
}
template <class T, class Mask>
inline void store_mask(uint8_t *to, Mask on) {
  *reinterpret_cast<Bytes<T> *>(to) = __builtin_convertvector(on & 1, Bytes<T>);
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

// A number in every lane. Not `Vector<T>{} + number`, which would add: of -0 it makes +0.
template <class T>
inline Vector<T> broadcast(T number) {
  return number - Vector<T>{};
}

inline float exp_of(float x) { return __builtin_expf(x); }
inline double exp_of(double x) { return __builtin_exp(x); }
inline float log1p_of(float x) { return __builtin_log1pf(x); }
inline double log1p_of(double x) { return __builtin_log1p(x); }

template <class T>
inline T sum_of(Vector<T> value) {
  T sum = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) sum += value[lane];
  return sum;
}

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

// Calls `each` with every place of a tile of M rows and N vectors.
template <int M, int N, class Each>
inline void for_tile(Each each) {
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) each(m, n);
}

// sums[m, :] += sum_k a[m * a_row + k * a_depth] * b[k, :] for M rows and N vectors of columns. Beside its own work it
// calls `fetch(k)` for what comes next: the hardware's own fetching stops at the end of a page.
template <int M, int N, class T, class Fetch>
inline void outer_tile(Vector<T> (&sums)[M][N], const T *a, int64_t a_row, int64_t a_depth, const T *b,
                       int64_t b_stride, int64_t depth, Fetch fetch) {
  for (int64_t k = 0; k < depth; ++k) {
    fetch(k);
    Vector<T> row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = load(b + k * b_stride + n * kLanes<T>);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const Vector<T> factor = broadcast(a[m * a_row + k * a_depth]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] += factor * row[n];
    }
  }
}

// c (rows, columns) = a (rows, depth) @ b (depth, columns), and c itself added to it if `accumulate`.
template <class T>
void product_block(int64_t rows, int64_t columns, int64_t depth, const T *a, int64_t a_stride, const T *b,
                   int64_t b_stride, T *c, int64_t c_stride, bool accumulate) {
  for_column_strips<T>(columns, [&](int64_t column, auto vectors) {
    const T *strip = b + column, *next_strip = strip + vectors.value * kLanes<T>;
    for_row_tiles<kTileRows>(rows, [&](int64_t row, auto tile_rows) {
      constexpr int M = tile_rows.value, N = vectors.value;
      T *to = c + row * c_stride + column;
      const T *soon = next_strip + row / kTileRows * kLanes<T>;
      Vector<T> sums[M][N] = {};
      if (accumulate) for_tile<M, N>([&](int m, int n) { sums[m][n] = load(to + m * c_stride + n * kLanes<T>); });
      outer_tile<M, N, T>(sums, a + row * a_stride, a_stride, 1, strip, b_stride, depth,
                          [=](int64_t k) { __builtin_prefetch(soon + k * b_stride, 0, 2); });
      for_tile<M, N>([&](int m, int n) { store(to + m * c_stride + n * kLanes<T>, sums[m][n]); });
    });
  });
}

// Calls `run` with the beginning and the size of each block of a depth; once for a depth of zero, too: a sum over
// nothing.
template <class Run>
inline void for_depth_blocks(int64_t depth, Run run) {
  int64_t from = 0;
  do {
    run(from, depth - from < kDepthBlock ? depth - from : kDepthBlock);
    from += kDepthBlock;
  } while (from < depth);
}

// c (rows, columns) = a (rows, depth) @ b (depth, columns)
template <class T>
void product(int64_t rows, int64_t columns, int64_t depth, const T *a, int64_t a_stride, const T *b, int64_t b_stride,
             T *c, int64_t c_stride) {
  for_depth_blocks(depth, [&](int64_t from, int64_t size) {
    product_block(rows, columns, size, a + from, a_stride, b + from * b_stride, b_stride, c, c_stride, from > 0);
  });
}

// A parameter's step where its gradient is made, in torch.optim.SGD's own order of operations and roundings.
template <class T>
struct Sgd {
  T learning_rate, decay, weight_decay;
  bool nesterov;

  template <class V>
  void step(V gradient, V &parameter, V &momentum) const {
    if (weight_decay != 0) gradient += weight_decay * parameter;
    momentum *= decay;
    // Rounded here, and not in the sum that follows.
    asm("" : "+x"(momentum));
    momentum += gradient;
    parameter -= learning_rate * (nesterov ? gradient + decay * momentum : momentum);
  }
  void operator()(Vector<T> gradient, T *parameter, T *momentum) const {
    Vector<T> p = load(parameter), m = load(momentum);
    step(gradient, p, m);
    store(parameter, p);
    store(momentum, m);
  }
  // Gradients with padded rows; parameters without.
  void rows(const T *gradient, int64_t stride, T *parameter, T *momentum, int64_t rows, int64_t columns) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c)
        step(gradient[r * stride + c], parameter[r * columns + c], momentum[r * columns + c]);
  }
};

// A weight's gradient, from A = a (depth, rows).T @ b (depth, columns): A itself for the first layer. For the second,
// scale[:, None] * A, and row_sums = (weight * A).sum(1) with weight (rows, columns). Each vector of it goes to
// `sink(cell, vector)` once, after the weight's own cell has been read; `sink.fetch(cell, weight)` comes a strip earlier.
template <bool SecondLayer, class T, class Sink>
void gradient_product(int64_t rows, int64_t columns, int64_t depth, const T *a, int64_t a_stride, const T *b,
                      int64_t b_stride, Sink sink, const T *weight, const T *scale = nullptr, T *row_sums = nullptr) {
  for_row_tiles<kTileRows>(rows, [&](int64_t row, auto tile_rows) {
    constexpr int M = tile_rows.value;
    Vector<T> parts[M] = {};
    for_column_strips<T>(columns, [&](int64_t column, auto vectors) {
      constexpr int N = vectors.value;
      const int64_t cell = row * columns + column;
      Vector<T> sums[M][N] = {};
      const int64_t next = column + N * kLanes<T> < columns ? cell + N * kLanes<T> : (row + M) * columns;
      outer_tile<M, N, T>(sums, a + row, 1, a_stride, b + column, b_stride, depth, [=](int64_t k) {
        if (k < M * N) sink.fetch(next + k / N * columns + k % N * kLanes<T>, weight);
      });
      // Copies of its own, which no store can be suspected to change.
      const Sink own_sink = sink;
      const T *own_weight = weight, *own_scale = scale;
      const int64_t stride = columns;
      for_tile<M, N>([&](int m, int n) {
        const int64_t at = cell + m * stride + n * kLanes<T>;
        if constexpr (SecondLayer) {
          parts[m] += load(own_weight + at) * sums[m][n];
          sums[m][n] *= own_scale[row + m];
        }
        own_sink(at, sums[m][n]);
      });
    });
    if constexpr (SecondLayer)
      for (int m = 0; m < M; ++m) row_sums[row + m] = sum_of<T>(parts[m]);
  });
}

// Writes the gradient, past the caches; nowhere if `to` is null.
template <bool SecondLayer, class T>
struct Written {
  T *to;
  bool aligned;
  Written(T *to, int64_t columns)
      : to(to), aligned(reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0 && columns % kLanes<T> == 0) {}

  void fetch(int64_t at, const T *weight) const {
    if constexpr (SecondLayer) __builtin_prefetch(weight + at, 0, 2);
  }
  void operator()(int64_t at, Vector<T> gradient) const {
    if (!to) return;
    if (aligned) stream(to + at, gradient);
    else store(to + at, gradient);
  }
};

// Moves the parameter and its momentum, which nobody needs any more.
template <class T>
struct Moved {
  Sgd<T> sgd;
  T *parameter, *momentum;

  void fetch(int64_t at, const T *) const {
    __builtin_prefetch(parameter + at, 1, 2);
    __builtin_prefetch(momentum + at, 1, 2);
  }
  void operator()(int64_t at, Vector<T> gradient) const { sgd(gradient, parameter + at, momentum + at); }
};

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
      Vector<T> unit = load(b + n * b_stride + k);
      // Kept in a register: else the compiler loads it again for every row, and loads are the limit.
      asm("" : "+v"(unit));
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
  return most_pairs * (3 * (head.dim_stride + head.hidden_stride + 1) + kLanes<T>) // pairs
         + 2 * (hp * dp + hp * hp) + 8 * hp + 16 * 24;                              // padded copies
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

// x where the activation is on, else 0.
template <class T>
void mask(int64_t rows, int64_t columns, const T *activation, T *x, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < columns; c += kLanes<T>)
      store(x + i * stride + c, load(activation + i * stride + c) > T(0) ? load(x + i * stride + c) : Vector<T>{});
}

// The second layer's end for some of its units, with x before its bias: adds w3 . relu(x + bias) to the pairs' sums, and
// where the ReLU is on, x = w3 (which is u2) and active = 1, else 0. `active` may be null. A NaN stays one in the sums.
template <class T>
void finish_second_layer(int64_t rows, int64_t columns, const T *bias, const T *w3, T *x, uint8_t *active,
                         int64_t stride, T *logit_sums) {
  for (int64_t i = 0; i < rows; ++i) {
    Vector<T> sums = load(logit_sums + i * kLanes<T>);
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      const Vector<T> value = load(x + i * stride + c) + load(bias + c), last = load(w3 + c);
      sums += last * (value < T(0) ? Vector<T>{} : value);
      store(x + i * stride + c, value > T(0) ? last : Vector<T>{});
      if (active) store_mask<T>(active + i * stride + c, value > T(0));
    }
    store(logit_sums + i * kLanes<T>, sums);
  }
}

template <class T>
void forward(const Head<T> &head, int64_t k, T *memory) {
  Scratch<T> scratch{memory};
  const int64_t first = head.offsets[k], n = head.offsets[k + 1] - first, hs = head.hidden_stride, ds = head.dim_stride;
  const Weights<T> own = weights_of(head, k, scratch);
  const int64_t dim = own.dim, hidden = own.hidden;
  const T *x = gather(head, first, n, scratch);
  T *h1 = head.h1 ? head.h1 + first * hs : scratch.take(n * hs);
  T *u1 = head.u1 ? head.u1 + first * hs : scratch.take(n * hs);
  T *u2 = scratch.take(n * hs), *logit_sums = scratch.take(n * kLanes<T>);
  T *jacobian = head.jacobian + first * ds;

  transposed_product(n, hidden, dim, x, ds, own.w1, dim, h1, hs);
  add_bias_and_rectify(n, hidden, own.b1, h1, hs);
  for (int64_t i = 0; i < n * kLanes<T>; ++i) logit_sums[i] = T(0);
  // Second layer and its transpose take turns, block of units by block: W2 comes from memory once.
  for_depth_blocks(hidden, [&](int64_t from, int64_t units) {
    const T *block = own.w2 + from * hidden;
    transposed_product(n, units, hidden, h1, hs, block, hidden, u2 + from, hs);
    finish_second_layer(n, units, own.b2 + from, own.w3 + from, u2 + from,
                        head.active2 ? head.active2 + first * hs + from : nullptr, hs, logit_sums);
    product_block(n, hidden, units, u2 + from, hs, block, hidden, u1, hs, from > 0);
  });
  mask(n, hidden, h1, u1, hs);
  product(n, dim, hidden, u1, hs, own.w1, dim, jacobian, ds);

  double loss = 0, gradient_norm = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t sample = head.rows[first + i];
    const T weight = head.weight[sample * head.num_discriminators + k];
    const T signed_logit = (1 - 2 * head.label[sample]) * (sum_of<T>(load(logit_sums + i * kLanes<T>)) + head.b3[k]);
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

// dz and dn / n of the pairs; returns the sum of dz.
template <class T>
T pair_gradients(const Head<T> &head, int64_t k, T *dz, T *direction) {
  const int64_t first = head.offsets[k], n = head.offsets[k + 1] - first;
  T sum_dz = 0;
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
  return sum_dz;
}

// q: the gradient to the jacobians.
template <class T>
T *jacobian_gradient(const Head<T> &head, int64_t k, int64_t dim, const T *direction, Scratch<T> &scratch) {
  const int64_t first = head.offsets[k], n = head.offsets[k + 1] - first, ds = head.dim_stride;
  const T *jacobian = head.jacobian + first * ds;
  T *q = scratch.take(n * ds);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < dim; c += kLanes<T>) store(q + i * ds + c, direction[i] * load(jacobian + i * ds + c));
  return q;
}

// The right operand of dW1: to = dz f + q.
template <class T>
void first_operand(const Head<T> &head, int64_t k, int64_t dim, const T *dz, const T *q, Scratch<T> &scratch, T *to) {
  const int64_t first = head.offsets[k], n = head.offsets[k + 1] - first, ds = head.dim_stride;
  const T *x = gather(head, first, n, scratch);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < dim; c += kLanes<T>)
      store(to + i * ds + c, dz[i] * load(x + i * ds + c) + load(q + i * ds + c));
}

// The right operand of dW2: to = dz h1 + g1, for which the scratch holds g1 before its mask. `to` may be h1.
template <class T>
void second_operand(const Head<T> &head, int64_t k, const Weights<T> &own, const T *dz, const T *q, T *scratch, T *to) {
  const int64_t first = head.offsets[k], n = head.offsets[k + 1] - first, hs = head.hidden_stride, ds = head.dim_stride;
  const T *h1 = head.h1 + first * hs;
  // Without a gradient to the norm, q and g1 are zero.
  const bool has_norm = head.grad_gradient_norm[k] != 0;
  if (has_norm) transposed_product(n, own.hidden, own.dim, q, ds, own.w1, own.dim, scratch, hs);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < own.hidden; c += kLanes<T>) {
      const Vector<T> activation = load(h1 + i * hs + c);
      Vector<T> value = dz[i] * activation;
      if (has_norm) value += activation > T(0) ? load(scratch + i * hs + c) : Vector<T>{};
      store(to + i * hs + c, value);
    }
}

// The second layer's mask as numbers.
template <class T>
T *active_units(const Head<T> &head, int64_t k, int64_t hidden, Scratch<T> &scratch) {
  const int64_t first = head.offsets[k], n = head.offsets[k + 1] - first, hs = head.hidden_stride;
  T *active2 = scratch.take(n * hs);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < hidden; c += kLanes<T>)
      store(active2 + i * hs + c, load_mask<T>(head.active2 + (first + i) * hs + c));
  return active2;
}

template <class T>
void backward(const Head<T> &head, int64_t k, T *memory) {
  Scratch<T> scratch{memory};
  const int64_t first = head.offsets[k], n = head.offsets[k + 1] - first, hs = head.hidden_stride, ds = head.dim_stride;
  T *dz = scratch.take(n), *direction = scratch.take(n);
  const T sum_dz = pair_gradients(head, k, dz, direction);
  if (!head.h1) return; // the discriminators are frozen

  const Weights<T> own = weights_of(head, k, scratch);
  const int64_t dim = own.dim, hidden = own.hidden, h = head.hidden, d = head.dim;
  const bool aligned = dim == d && hidden == h;
  const T *u1 = head.u1 + first * hs;
  const T *q = jacobian_gradient(head, k, dim, direction, scratch);

  if (head.grad_w1) {
    T *both = scratch.take(n * ds);
    first_operand(head, k, dim, dz, q, scratch, both);
    T *to = aligned ? head.grad_w1 + k * h * d : scratch.take(hidden * dim);
    gradient_product<false>(hidden, dim, n, u1, hs, both, ds, Written<false, T>(to, dim), own.w1);
    if (!aligned) unpad(to, dim, head.grad_w1 + k * h * d, h, d);
  }
  T *row = scratch.take(hidden); // a gradient (H,) with its padding
  if (head.grad_b1) {
    product(1, hidden, n, dz, n, u1, hs, row, hidden);
    unpad(row, hidden, head.grad_b1 + k * h, 1, h);
  }
  if (head.grad_b3) head.grad_b3[k] = sum_dz;
  if (!head.grad_b2 && !head.grad_w2 && !head.grad_w3) return;

  // With A = sum_p m2 (dz h1 + g1)^T and a = sum_p dz m2: dW2 = w3 A, db2 = w3 a, dw3 = rowsum(W2 * A) + b2 a, which
  // takes the product with W2 after the sum over pairs.
  const T *active2 = active_units(head, k, hidden, scratch);
  T *sum_active = scratch.take(hidden);
  product(1, hidden, n, dz, n, active2, hs, sum_active, hidden);
  if (head.grad_b2) {
    for (int64_t c = 0; c < hidden; c += kLanes<T>) store(row + c, load(own.w3 + c) * load(sum_active + c));
    unpad(row, hidden, head.grad_b2 + k * h, 1, h);
  }
  if (!head.grad_w2 && !head.grad_w3) return;

  T *right = scratch.take(n * hs);
  second_operand(head, k, own, dz, q, right, right);
  T *grad_w2 = head.grad_w2 ? head.grad_w2 + k * h * h : nullptr;
  T *to = grad_w2 && !aligned ? scratch.take(hidden * hidden) : grad_w2;
  gradient_product<true>(hidden, hidden, n, active2, hs, right, hs, Written<true, T>(to, hidden), own.w2, own.w3, row);
  if (to != grad_w2) unpad(to, hidden, grad_w2, h, h);
  if (head.grad_w3) {
    for (int64_t c = 0; c < hidden; c += kLanes<T>)
      store(row + c, load(row + c) + load(own.b2 + c) * load(sum_active + c));
    unpad(row, hidden, head.grad_w3 + k * h, 1, h);
  }
}

// Whether any entry is beyond `largest`, or no number.
template <class T>
bool beyond(int64_t rows, int64_t columns, const T *x, int64_t stride, T largest) {
  Vector<T> most = {};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      const Vector<T> value = load(x + i * stride + c), size = value < T(0) ? -value : value;
      most = size <= most ? most : size; // a NaN stays: no comparison with it holds
      most = size <= largest ? most : broadcast(T(__builtin_inff()));
    }
  for (int64_t lane = 0; lane < kLanes<T>; ++lane)
    if (!(most[lane] <= largest)) return true;
  return false;
}

// All of a step but the weights' products and the moves: nothing moves here, and everything that they need is known.
template <class T>
void operands(const Head<T> &head, int64_t k, T *memory) {
  Scratch<T> scratch{memory};
  const Update<T> &update = head.update;
  const int64_t first = head.offsets[k], n = head.offsets[k + 1] - first, hs = head.hidden_stride, ds = head.dim_stride;
  T *dz = update.grad_logit + first, *direction = scratch.take(n);
  update.sum_grad_logit[k] = pair_gradients(head, k, dz, direction);
  const Weights<T> own = weights_of(head, k, scratch);
  const int64_t dim = own.dim, hidden = own.hidden;
  T *h1 = head.h1 + first * hs, *jacobian = head.jacobian + first * ds;
  const T *u1 = head.u1 + first * hs, *q = jacobian_gradient(head, k, dim, direction, scratch);
  first_operand(head, k, dim, dz, q, scratch, jacobian);
  product(1, hidden, n, dz, n, u1, hs, update.bias_sum_1 + k * hidden, hidden);
  product(1, hidden, n, dz, n, active_units(head, k, hidden, scratch), hs, update.bias_sum_2 + k * hidden, hidden);
  second_operand(head, k, own, dz, q, scratch.take(n * hs), h1);
  const T largest = update.largest;
  update.bad[k] = beyond(n, dim, jacobian, ds, largest) || beyond(n, hidden, u1, hs, largest) ||
                  beyond(n, hidden, h1, hs, largest) || beyond(1, hidden, update.bias_sum_1 + k * hidden, 0, largest) ||
                  beyond(1, hidden, update.bias_sum_2 + k * hidden, 0, largest) ||
                  beyond(1, hidden, own.w3, 0, largest) || beyond(1, hidden, own.b2, 0, largest) ||
                  !(update.sum_grad_logit[k] <= largest && update.sum_grad_logit[k] >= -largest);
}

template <class T>
void move(const Head<T> &head, int64_t k, T *memory) {
  Scratch<T> scratch{memory};
  const Update<T> &update = head.update;
  const int64_t first = head.offsets[k], n = head.offsets[k + 1] - first, hs = head.hidden_stride, ds = head.dim_stride;
  const int64_t h = head.hidden, d = head.dim;
  const int64_t sizes[6] = {h * d, h, h * h, h, h, 1};
  T *parameter[6], *momentum[6];
  for (int each = 0; each < 6; ++each)
    parameter[each] = update.parameters[each] + k * sizes[each], momentum[each] = update.momentum[each] + k * sizes[each];
  const Sgd<T> sgd{update.learning_rate, update.decay, update.weight_decay, update.nesterov};
  const Weights<T> own = weights_of(head, k, scratch);
  const int64_t dim = own.dim, hidden = own.hidden;
  const bool aligned = dim == d && hidden == h;
  const T *sum_active = update.bias_sum_2 + k * hidden;
  T *row = scratch.take(hidden), *padded_gradient = aligned ? nullptr : scratch.take(hidden * hidden);

  const T *active2 = active_units(head, k, hidden, scratch), *right = head.h1 + first * hs;
  if (aligned) {
    gradient_product<true>(hidden, hidden, n, active2, hs, right, hs, Moved<T>{sgd, parameter[2], momentum[2]}, own.w2,
                           own.w3, row);
  } else {
    gradient_product<true>(hidden, hidden, n, active2, hs, right, hs, Written<true, T>(padded_gradient, 1), own.w2,
                           own.w3, row);
    sgd.rows(padded_gradient, hidden, parameter[2], momentum[2], h, h);
  }
  const T *u1 = head.u1 + first * hs, *both = head.jacobian + first * ds;
  if (aligned) {
    gradient_product<false>(hidden, dim, n, u1, hs, both, ds, Moved<T>{sgd, parameter[0], momentum[0]}, own.w1);
  } else {
    padded_gradient = scratch.take(hidden * dim);
    gradient_product<false>(hidden, dim, n, u1, hs, both, ds, Written<false, T>(padded_gradient, 1), own.w1);
    sgd.rows(padded_gradient, dim, parameter[0], momentum[0], h, d);
  }
  for (int64_t c = 0; c < hidden; c += kLanes<T>)
    store(row + c, load(row + c) + load(own.b2 + c) * load(sum_active + c)); // dw3
  T *grad_b2 = scratch.take(hidden);
  for (int64_t c = 0; c < hidden; c += kLanes<T>) store(grad_b2 + c, load(own.w3 + c) * load(sum_active + c));
  sgd.rows(update.bias_sum_1 + k * hidden, hidden, parameter[1], momentum[1], 1, h);
  sgd.rows(grad_b2, hidden, parameter[3], momentum[3], 1, h);
  // The only gradient whose bound takes W2 itself: where it overflows although no operand is large, w3 stays.
  if (beyond(1, hidden, row, 0, kLargest<T>)) update.bad[k] = true;
  else sgd.rows(row, hidden, parameter[4], momentum[4], 1, h);
  sgd.rows(update.sum_grad_logit + k, 1, parameter[5], momentum[5], 1, 1);
}

// In the pairs' own order on one thread: little work, and the same sum whatever the number of threads.
template <class T>
void feature_gradient(const Head<T> &head) {
  for (int64_t i = 0; i < head.num_samples * head.dim; ++i) head.grad_features[i] = 0;
  for (int64_t pair = 0; pair < head.offsets[head.num_discriminators]; ++pair) {
    T *to = head.grad_features + head.rows[pair] * head.dim;
    const T *jacobian = head.jacobian + pair * head.dim_stride, factor = head.feature_coefficient[pair];
    for (int64_t c = 0; c < head.dim; ++c) to[c] += factor * jacobian[c];
  }
}

} // namespace

extern const Code<float> code_float{scratch_size<float>,     forward<float>,  backward<float>,
                                    feature_gradient<float>, operands<float>, move<float>};
extern const Code<double> code_double{scratch_size<double>,     forward<double>,  backward<double>,
                                      feature_gradient<double>, operands<double>, move<double>};

} // namespace GSDA_ISA
} // namespace gsda
