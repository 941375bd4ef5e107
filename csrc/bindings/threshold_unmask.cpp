#include "threshold_unmask/params.h"

#include <optional>

#include "bindings/tensor_checks.h"

namespace llada {
namespace {

using OptionalTensor = std::optional<Tensor>;

template <class T>
const T* optional_data(const char* name, const OptionalTensor& x, ScalarType dtype, std::initializer_list<int64_t> shape) {
  if (!x.has_value()) return nullptr;
  check_tensor(name, *x, dtype, shape);
  return static_cast<const T*>(x->const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> threshold_unmask(const Tensor& logits, const Tensor& tokens, int64_t mask_token_id,
                                                    const Tensor& threshold, const OptionalTensor& editing_threshold,
                                                    const Tensor& min_unmask, const OptionalTensor& temperature,
                                                    const OptionalTensor& top_k, const OptionalTensor& top_p, const OptionalTensor& seed,
                                                    const OptionalTensor& editable, const OptionalTensor& positions,
                                                    const OptionalTensor& forward_index) {
  check(logits.dim() == 3, "logits: expected 3 dimensions, got shape ", shape_text(logits));
  const int64_t rows = logits.size(0), length = logits.size(1), vocab = logits.size(2);
  ThresholdUnmaskParams p{};
  p.bf16 = check_float_dtype("logits", logits);
  p.rows = rows, p.length = length, p.vocab = vocab, p.mask_token_id = mask_token_id;
  check(0 <= mask_token_id && mask_token_id < vocab, "mask_token_id: expected an id in [0, ", vocab, "), got ", mask_token_id);
  check_tensor("logits", logits, logits.scalar_type(), {rows, length, vocab});
  check_tensor("tokens", tokens, ScalarType::Long, {rows, length});
  check_tensor("threshold", threshold, ScalarType::Float, {rows});
  check_tensor("min_unmask", min_unmask, ScalarType::Long, {rows});
  p.logits = logits.const_data_ptr();
  p.tokens = static_cast<const int64_t*>(tokens.const_data_ptr());
  p.threshold = static_cast<const float*>(threshold.const_data_ptr());
  p.min_unmask = static_cast<const int64_t*>(min_unmask.const_data_ptr());
  p.editing_threshold = optional_data<float>("editing_threshold", editing_threshold, ScalarType::Float, {rows});
  p.temperature = optional_data<double>("temperature", temperature, ScalarType::Double, {rows});
  p.top_k = optional_data<int64_t>("top_k", top_k, ScalarType::Long, {rows});
  p.top_p = optional_data<double>("top_p", top_p, ScalarType::Double, {rows});
  p.seed = optional_data<int64_t>("seed", seed, ScalarType::Long, {rows});
  p.editable = optional_data<bool>("editable", editable, ScalarType::Bool, {rows, length});
  p.positions = optional_data<int64_t>("positions", positions, ScalarType::Long, {rows, length});
  p.forward_index = optional_data<int64_t>("forward_index", forward_index, ScalarType::Long, {rows});
  check(p.temperature == nullptr || (p.seed != nullptr && p.forward_index != nullptr),
        "seed, forward_index: expected tensors where temperature is given");
  Tensor new_tokens = torch::stable::empty_like(tokens);
  Tensor confidence = torch::stable::new_empty(tokens, {rows, length}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(tokens, {rows, 2}, ScalarType::Int);
  std::vector<char> bad(size_t(rows * length));
  p.new_tokens = static_cast<int64_t*>(new_tokens.mutable_data_ptr());
  p.confidence = static_cast<float*>(confidence.mutable_data_ptr());
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  p.bad = bad.data();
  threshold_unmask_cpu(p, torch_threads());
  for (int64_t i = 0; i < rows * length; ++i) {
    const char kind = bad[size_t(i)];
    const char* got = kind == 'n' ? "NaN" : kind == 'i' ? "+inf" : "no finite logit besides the mask token's";
    check(kind == 0, "logits: expected finite numbers, got ", got, " in row ", i / length, ", position ", i % length);
  }
  return {new_tokens, confidence, counts};
}

}  // namespace
}  // namespace llada

STABLE_TORCH_LIBRARY_IMPL(llada_kernels, CPU, m) { m.impl("threshold_unmask", TORCH_BOX(&llada::threshold_unmask)); }
