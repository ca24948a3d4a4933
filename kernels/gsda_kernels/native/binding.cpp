// The Python binding of the adversarial head: checks nothing that gsda_kernels/native/__init__.py has not checked.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <xmmintrin.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "head.h"

namespace nb = nanobind;

namespace {

using gsda::Code;
using gsda::Head;

template <class T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
template <class T>
using Wanted = std::optional<Array<T>>;

const char *instruction_set() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
  return nullptr;
}

template <class T>
const Code<T> &code_for(bool wide);
template <>
const Code<float> &code_for(bool wide) {
  return wide ? gsda::avx512::code_float : gsda::avx2::code_float;
}
template <>
const Code<double> &code_for(bool wide) {
  return wide ? gsda::avx512::code_double : gsda::avx2::code_double;
}

template <class T>
T *pointer(const Wanted<T> &array) {
  return array ? array->data() : nullptr;
}

// Pairs with a non-zero weight, sorted by discriminator.
struct Routing {
  std::vector<int64_t> rows, offsets;
  int64_t most_pairs = 0; // of one discriminator
};

template <class T>
Routing route(const T *weight, int64_t num_samples, int64_t num_discriminators) {
  Routing routing;
  routing.offsets.push_back(0);
  for (int64_t k = 0; k < num_discriminators; ++k) {
    for (int64_t i = 0; i < num_samples; ++i)
      if (weight[i * num_discriminators + k] != 0) routing.rows.push_back(i);
    const int64_t count = int64_t(routing.rows.size()) - routing.offsets.back();
    if (count > routing.most_pairs) routing.most_pairs = count;
    routing.offsets.push_back(int64_t(routing.rows.size()));
  }
  return routing;
}

struct Free {
  void operator()(void *memory) const { std::free(memory); }
};

// Runs `one(head, discriminator, scratch)` for every discriminator, each on one thread.
template <class T, class One>
void for_discriminators(const Head<T> &head, int64_t scratch_size, int num_threads, One one) {
  const size_t bytes = (size_t(scratch_size) * sizeof(T) + 63) / 64 * 64;
  std::atomic<bool> out_of_memory = false;
#pragma omp parallel num_threads(num_threads)
  {
    std::unique_ptr<void, Free> scratch(std::aligned_alloc(64, bytes));
    if (!scratch) out_of_memory = true;
#pragma omp for schedule(dynamic)
    for (int64_t k = 0; k < head.num_discriminators; ++k)
      if (scratch) one(head, k, static_cast<T *>(scratch.get()));
    // What was written past the caches is there before anyone who waits for this thread goes on.
    _mm_sfence();
  }
  if (out_of_memory) throw std::bad_alloc();
}

template <class T>
Head<T> make_head(const std::vector<Array<T>> &tensors, const Array<T> &weight, const Array<T> &label,
                  const std::vector<Array<T>> &saved, const Wanted<uint8_t> &active2, const Routing &routing) {
  Head<T> head{};
  head.num_samples = int64_t(tensors[0].shape(0));
  head.dim = int64_t(tensors[0].shape(1));
  head.num_discriminators = int64_t(tensors[1].shape(0));
  head.hidden = int64_t(tensors[1].shape(1));
  head.features = tensors[0].data();
  head.w1 = tensors[1].data(), head.b1 = tensors[2].data();
  head.w2 = tensors[3].data(), head.b2 = tensors[4].data();
  head.w3 = tensors[5].data(), head.b3 = tensors[6].data();
  head.weight = weight.data(), head.label = label.data();
  head.rows = routing.rows.data(), head.offsets = routing.offsets.data();
  head.jacobian = saved[0].data(), head.residual = saved[1].data(), head.norm = saved[2].data();
  head.dim_stride = int64_t(saved[0].shape(1));
  if (active2) head.h1 = saved[3].data(), head.u1 = saved[4].data(), head.active2 = active2->data();
  return head;
}

template <class T>
bool forward(const std::vector<Array<T>> &tensors, const Array<T> &weight, const Array<T> &label,
             const std::vector<Array<T>> &saved, const Wanted<uint8_t> &active2, int64_t hidden_stride,
             const Array<T> &loss, const Array<T> &gradient_norm, int num_threads, bool wide) {
  nb::gil_scoped_release release;
  const Routing routing = route(weight.data(), int64_t(weight.shape(0)), int64_t(weight.shape(1)));
  if (routing.rows.size() > saved[0].shape(0)) return false;
  Head<T> head = make_head(tensors, weight, label, saved, active2, routing);
  head.hidden_stride = hidden_stride;
  head.loss = loss.data(), head.gradient_norm = gradient_norm.data();
  const Code<T> &code = code_for<T>(wide);
  for_discriminators(head, code.scratch_size(head, routing.most_pairs), num_threads, code.forward);
  return true;
}

template <class T>
bool backward(const std::vector<Array<T>> &tensors, const Array<T> &weight, const Array<T> &label,
              const std::vector<Array<T>> &saved, const Wanted<uint8_t> &active2, int64_t hidden_stride,
              const Array<T> &grad_loss, const Array<T> &grad_gradient_norm, double loss_feature_scale,
              const std::vector<Wanted<T>> &gradients, int num_threads, bool wide) {
  nb::gil_scoped_release release;
  const Routing routing = route(weight.data(), int64_t(weight.shape(0)), int64_t(weight.shape(1)));
  if (routing.rows.size() > saved[0].shape(0)) return false;
  Head<T> head = make_head(tensors, weight, label, saved, active2, routing);
  head.hidden_stride = hidden_stride;
  head.grad_loss = grad_loss.data(), head.grad_gradient_norm = grad_gradient_norm.data();
  head.loss_feature_scale = T(loss_feature_scale);
  head.grad_w1 = pointer(gradients[1]), head.grad_b1 = pointer(gradients[2]);
  head.grad_w2 = pointer(gradients[3]), head.grad_b2 = pointer(gradients[4]);
  head.grad_w3 = pointer(gradients[5]), head.grad_b3 = pointer(gradients[6]);
  std::vector<T> coefficient(routing.rows.size());
  head.feature_coefficient = coefficient.data(), head.grad_features = pointer(gradients[0]);
  const Code<T> &code = code_for<T>(wide);
  for_discriminators(head, code.scratch_size(head, routing.most_pairs), num_threads, code.backward);
  if (head.grad_features) code.feature_gradient(head);
  return true;
}

// Backward and a step of stochastic gradient descent in one; whether something was bad, so that nothing has moved.
template <class T>
bool update(const std::vector<Array<T>> &tensors, const Array<T> &weight, const Array<T> &label,
            const std::vector<Array<T>> &saved, const Wanted<uint8_t> &active2, int64_t hidden_stride,
            const Array<T> &grad_loss, const Array<T> &grad_gradient_norm, const std::vector<Array<T>> &momentum,
            double learning_rate, double decay, double weight_decay, bool nesterov, int num_threads, bool wide) {
  nb::gil_scoped_release release;
  const Routing routing = route(weight.data(), int64_t(weight.shape(0)), int64_t(weight.shape(1)));
  const size_t num_pairs = routing.rows.size();
  if (num_pairs > saved[0].shape(0)) return true;
  Head<T> head = make_head(tensors, weight, label, saved, active2, routing);
  head.hidden_stride = hidden_stride;
  head.grad_loss = grad_loss.data(), head.grad_gradient_norm = grad_gradient_norm.data();

  const size_t k = size_t(head.num_discriminators), units = (size_t(head.hidden) + 15) / 16 * 16;
  std::vector<T> grad_logit(num_pairs), coefficient(num_pairs), sums_1(k * units), sums_2(k * units), sum_grad_logit(k);
  const std::unique_ptr<bool[]> bad(new bool[k]());
  gsda::Update<T> &move = head.update;
  for (size_t each = 0; each < 6; ++each)
    move.parameters[each] = tensors[1 + each].data(), move.momentum[each] = momentum[each].data();
  move.learning_rate = T(learning_rate), move.decay = T(decay), move.weight_decay = T(weight_decay);
  move.nesterov = nesterov;
  move.largest = T(std::sqrt(std::numeric_limits<T>::max() / (4 * double(head.num_samples))));
  head.feature_coefficient = coefficient.data();
  move.grad_logit = grad_logit.data(), move.bias_sum_1 = sums_1.data(), move.bias_sum_2 = sums_2.data();
  move.sum_grad_logit = sum_grad_logit.data(), move.bad = bad.get();

  const Code<T> &code = code_for<T>(wide);
  const int64_t scratch = code.scratch_size(head, routing.most_pairs);
  const auto any_bad = [&] {
    for (size_t each = 0; each < k; ++each)
      if (bad[each]) return true;
    return false;
  };
  for_discriminators(head, scratch, num_threads, code.operands);
  if (any_bad()) return true;
  for_discriminators(head, scratch, num_threads, code.move);
  return any_bad();
}

// Arrays are taken as they are or refused: what is written into a converted copy would be lost.
template <class T>
void define(nb::module_ &module) {
  module.def("forward", &forward<T>, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
             nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg(), nb::arg().noconvert(),
             nb::arg().noconvert(), nb::arg(), nb::arg());
  module.def("backward", &backward<T>, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
             nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg(), nb::arg().noconvert(),
             nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg());
  module.def("update", &update<T>, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
             nb::arg().noconvert(), nb::arg().noconvert().none(), nb::arg(), nb::arg().noconvert(),
             nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg());
}

} // namespace

NB_MODULE(_head, module) {
  module.def("instruction_set", &instruction_set, "The widest usable of avx512 and avx2; None where there is neither.");
  define<float>(module);
  define<double>(module);
}
