// launch_rule: chooses the instantiation of the step's kernels for one rule. The extension instantiates it
// once per rule (step_rule.cu).
#pragma once

#include "core/rules.h"
#include "cuda/step_kernel.h"
#include "cuda/step_launch.h"
#include "cuda/step_rows.h"

namespace quantopt {
namespace {

template <class Row, class Direction>
cudaError_t launch_with(const StepLaunch& s) {
  const auto constants = Row::constants(s.params.hyper, s.params.decoupled);
  const Launch how = launch_of(s.table.first_block[s.table.count], s.stream);
  const auto with = [&](auto* kernel) {
    return launch<kStepArgumentBytes>(how, kernel, s.table, s.params, constants);
  };
  if constexpr (Row::kDynamicScale) {
    if (s.phase == Phase::kMagnitude) return with(magnitude_kernel<Row, Direction>);
    if (s.phase == Phase::kGroups) {
      return s.storage == Storage::kFloat32 ? with(group_kernel<Row, Direction, Storage::kFloat32>)
                                            : with(group_kernel<Row, Direction, Storage::kAny>);
    }
    if (s.phase == Phase::kRows) {
      return s.storage == Storage::kFloat32 ? with(row_kernel<Row, Direction, Storage::kFloat32>)
                                            : with(row_kernel<Row, Direction, Storage::kAny>);
    }
  }
  if (s.storage == Storage::kFloat32) return with(step_kernel<Row, Direction, Storage::kFloat32>);
  if constexpr (!Row::Object::kLatent) {
    if (s.storage == Storage::kBFloat16) return with(step_kernel<Row, Direction, Storage::kBFloat16>);
    if (s.storage == Storage::kBFloat16Wide) return with(step_kernel<Row, Direction, Storage::kBFloat16Wide>);
  }
  return with(step_kernel<Row, Direction, Storage::kAny>);
}

template <class Row>
cudaError_t launch_row(const StepLaunch& s) {
  return s.adam ? launch_with<Row, AdamBase>(s) : launch_with<Row, SgdBase>(s);
}

}  // namespace

template <Rule rule>
cudaError_t launch_rule(const StepLaunch& s) {
  if constexpr (RowOf<rule, true>::kQuantised) {
    if (!s.binary) return launch_row<RowOf<rule, false>>(s);
  }
  return launch_row<RowOf<rule, true>>(s);
}

}  // namespace quantopt
