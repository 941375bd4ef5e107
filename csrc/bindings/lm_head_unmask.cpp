#include "lm_head_unmask/params.h"

#include "bindings/unmask_arguments.h"

namespace llada {
namespace {

std::tuple<Tensor, Tensor, Tensor> lm_head_unmask(const Tensor& hidden, const Tensor& lm_head, const Tensor& tokens, int64_t mask_token_id,
                                                  const Tensor& threshold, const OptionalTensor& editing_threshold,
                                                  const Tensor& min_unmask, const OptionalTensor& editable) {
  check(hidden.dim() == 3, "hidden: expected 3 dimensions, got shape ", shape_text(hidden));
  LmHeadUnmaskParams p{};
  p.rules.bf16 = check_float_dtype("hidden", hidden);
  p.rules.rows = hidden.size(0), p.rules.length = hidden.size(1), p.width = hidden.size(2);
  check_tensor("hidden", hidden, hidden.scalar_type(), {-1, -1, -1});
  check_tensor("lm_head", lm_head, hidden.scalar_type(), {-1, p.width});
  p.rules.vocab = lm_head.size(0), p.rules.mask_token_id = mask_token_id;
  const UnmaskCall call(p.rules, {"hidden", hidden}, tokens, threshold, editing_threshold, min_unmask, editable);
  p.hidden = hidden.const_data_ptr(), p.lm_head = lm_head.const_data_ptr();
  lm_head_unmask_cpu(p, torch_threads());
  return call.results();
}

}  // namespace
}  // namespace llada

STABLE_TORCH_LIBRARY_IMPL(llada_kernels, CPU, m) { m.impl("lm_head_unmask", TORCH_BOX(&llada::lm_head_unmask)); }
