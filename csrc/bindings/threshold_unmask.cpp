#include "bindings/unmask_arguments.h"

namespace llada {
namespace {

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
  check_tensor("logits", logits, logits.scalar_type(), {rows, length, vocab});
  const UnmaskCall call(p, tokens, threshold, editing_threshold, min_unmask, editable);
  p.logits = logits.const_data_ptr();
  p.temperature = optional_data<double>("temperature", temperature, ScalarType::Double, {rows});
  p.top_k = optional_data<int64_t>("top_k", top_k, ScalarType::Long, {rows});
  p.top_p = optional_data<double>("top_p", top_p, ScalarType::Double, {rows});
  p.seed = optional_data<int64_t>("seed", seed, ScalarType::Long, {rows});
  p.positions = optional_data<int64_t>("positions", positions, ScalarType::Long, {rows, length});
  p.forward_index = optional_data<int64_t>("forward_index", forward_index, ScalarType::Long, {rows});
  check(p.temperature == nullptr || (p.seed != nullptr && p.forward_index != nullptr),
        "seed, forward_index: expected tensors where temperature is given");
  threshold_unmask_cpu(p, torch_threads());
  return call.results();
}

}  // namespace
}  // namespace llada

STABLE_TORCH_LIBRARY_IMPL(llada_kernels, CPU, m) { m.impl("threshold_unmask", TORCH_BOX(&llada::threshold_unmask)); }
