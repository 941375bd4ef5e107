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
  const Beside beside{"logits", logits};
  ThresholdUnmaskParams p{};
  p.bf16 = check_float_dtype("logits", logits);
  p.rows = rows, p.length = length, p.vocab = vocab, p.mask_token_id = mask_token_id;
  check_tensor("logits", logits, logits.scalar_type(), {rows, length, vocab}, &beside);
  const UnmaskCall call(p, beside, tokens, threshold, editing_threshold, min_unmask, editable);
  p.logits = logits.const_data_ptr();
  p.temperature = optional_data<double>("temperature", temperature, ScalarType::Double, {rows}, beside);
  p.top_k = optional_data<int64_t>("top_k", top_k, ScalarType::Long, {rows}, beside);
  p.top_p = optional_data<double>("top_p", top_p, ScalarType::Double, {rows}, beside);
  p.seed = optional_data<int64_t>("seed", seed, ScalarType::Long, {rows}, beside);
  p.positions = optional_data<int64_t>("positions", positions, ScalarType::Long, {rows, length}, beside);
  p.forward_index = optional_data<int64_t>("forward_index", forward_index, ScalarType::Long, {rows}, beside);
  check(p.temperature == nullptr || (p.seed != nullptr && p.forward_index != nullptr),
        "seed, forward_index: expected tensors where temperature is given");
  check(!on_cuda(logits) || p.temperature == nullptr || vocab <= 1 << 20,
        "logits: expected at most 2^20 ids where tokens are drawn on a GPU, got ", vocab);
  check(!on_cuda(logits) || rows * length * (vocab / 8192 + 1) < INT32_MAX, "logits: expected fewer positions on a GPU, got ",
        rows * length);
  run_kernel(
      "threshold_unmask", logits, threshold_unmask_workspace(p), [&](const Parallel& threads) { threshold_unmask_cpu(p, threads); },
      [&](void* workspace, void* stream) { return threshold_unmask_cuda(p, workspace, stream); });
  return call.results();
}

void implement(Library& m) { m.impl("threshold_unmask", TORCH_BOX(&threshold_unmask)); }

}  // namespace
}  // namespace llada

LLADA_REGISTER_CPU_AND_CUDA(llada::implement)
