// The adversarial head on a CPU: what the binding and the code for each instruction set share.
#pragma once

#include <cstdint>

namespace gsda {

// One step of stochastic gradient descent, taken where the gradients are made. `operands` comes first, for every
// discriminator: it writes over the saved h1 and jacobian what the weights' gradients are products of. If no operand is
// bad, `move` follows.
template <class T>
struct Update {
  T *parameters[6], *momentum[6]; // w1, b1, w2, b2, w3, b3
  T learning_rate, decay, weight_decay; // `decay`: of the momentum
  bool nesterov;
  T largest;                   // operands beyond this are bad: a sum of their products might not be finite
  T *grad_logit;               // (M,)
  T *bias_sum_1, *bias_sum_2;  // (K, padded H): sums over pairs of dz u1 and dz active2
  T *sum_grad_logit;           // (K,)
  bool *bad;                   // (K,)
};

// Pointers into the caller's contiguous tensors, for N samples, K discriminators D -> H -> H -> 1 and M pairs of a
// sample and a discriminator, sorted by discriminator. Null: not wanted (gradients), not kept (h1, u1, active2).
template <class T>
struct Head {
  int64_t num_samples, num_discriminators, dim, hidden;

  const T *features;          // (N, D)
  const T *w1, *b1, *w2, *b2; // (K, H, D), (K, H), (K, H, H), (K, H)
  const T *w3, *b3;           // (K, H), (K,)
  const T *weight, *label;    // (N, K), (N,)
  const int64_t *rows;        // (M,) sample of each pair
  const int64_t *offsets;     // (K + 1,) first pair of each discriminator

  // Kept for the backward, a row for each pair. A row's stride is a multiple of every vector's length.
  int64_t dim_stride, hidden_stride;
  T *h1, *u1;         // (M, hidden_stride): first layer, and the logit's gradient to it before its ReLU
  uint8_t *active2;   // (M, hidden_stride): where the second layer's ReLU is on, 0 or 1
  T *jacobian;        // (M, dim_stride): the logit's gradient to the features
  T *residual, *norm; // (M,): |sigmoid(z) - label|, ||jacobian||

  T *loss, *gradient_norm; // (K,) results

  const T *grad_loss, *grad_gradient_norm;                // (K,) upstream
  T loss_feature_scale;                                   // factor on the loss's gradient to the features alone
  T *feature_coefficient;                                 // (M,): d features[row] += coefficient * jacobian
  T *grad_features;                                       // (N, D)
  T *grad_w1, *grad_b1, *grad_w2, *grad_b2, *grad_w3, *grad_b3; // like the parameters

  Update<T> update;
};

// One instruction set's code. `scratch` is 64-byte aligned and private to the calling thread.
template <class T>
struct Code {
  int64_t (*scratch_size)(const Head<T> &, int64_t most_pairs);
  void (*forward)(const Head<T> &, int64_t discriminator, T *scratch);
  void (*backward)(const Head<T> &, int64_t discriminator, T *scratch);
  void (*feature_gradient)(const Head<T> &); // after every discriminator's backward
  void (*operands)(const Head<T> &, int64_t discriminator, T *scratch);
  void (*move)(const Head<T> &, int64_t discriminator, T *scratch);
};

namespace avx2 {
extern const Code<float> code_float;
extern const Code<double> code_double;
} // namespace avx2
namespace avx512 {
extern const Code<float> code_float;
extern const Code<double> code_double;
} // namespace avx512

} // namespace gsda
