#include "tools/ditattn/case_flags.hpp"

#include "tools/ditattn/flags.hpp"

namespace ditattn::cli {

void add_case_flags(CLI::App& verb, CaseFlags& flags) {
  const auto once_each = [](CLI::Option* option) { option->allow_extra_args(false); };
  once_each(verb.add_option("--shape", flags.shapes, "B,H,Sq,Skv,D: random Q/K/V of this shape (repeatable)"));
  once_each(verb.add_option("--input", flags.inputs,
                            "safetensors file with query, key, value, what else `run` takes; or a capture of many "
                            "cases, CASE.query and so on (repeatable)"));
  once_each(verb.add_option("--model", flags.models,
                            "NAME[@RESOLUTION][:ROLE]: random tensors as this model of `ditattn models` has them "
                            "(default: its first resolution, all roles; repeatable)"));
  add_call_flags(verb, flags.call);
  verb.add_option("--dtype", flags.dtype,
                  "float32, float16 or bfloat16: of random inputs (default float32); files are rounded to it");
  verb.add_option("--seed", flags.seed, "Seed of random inputs and of sampled rows")
      ->capture_default_str()
      ->check(number_from(0));
}

std::vector<CaseSource> case_sources(const CaseFlags& flags, DLDevice device) {
  std::optional<DLDataType> dtype;
  if (!flags.dtype.empty()) dtype = parse_float_dtype(flags.dtype);
  const DLDataType random_dtype = dtype.value_or(kFloat32);
  std::vector<std::vector<std::int64_t>> shapes;
  shapes.reserve(flags.shapes.size());
  for (const std::string& shape : flags.shapes) shapes.push_back(parse_shape(shape));
  std::vector<ModelProblem> problems;
  for (const std::string& model : flags.models) {
    for (ModelProblem& problem : parse_model_problems(model)) problems.push_back(std::move(problem));
  }
  for (const ModelProblem& problem : problems) check_work(problem, device);

  std::vector<CaseSource> sources;
  for (const std::string& file : flags.inputs) {
    for (Case& loaded : load_cases(file, flags.call)) {
      if (dtype) loaded.inputs = converted(loaded.inputs, *dtype);
      sources.push_back({loaded.name, [loaded] { return loaded; }});
    }
  }
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    sources.push_back(
        {flags.shapes[i], [name = flags.shapes[i], shape = shapes[i], random_dtype, seed = flags.seed + i] {
           return Case{.name = name, .inputs = random_inputs(shape, random_dtype, seed)};
         }});
  }
  for (const ModelProblem& problem : problems) {
    sources.push_back({problem.name, [problem, random_dtype, seed = flags.seed + sources.size()] {
                         return model_case(problem, random_dtype, seed);
                       }});
  }
  return sources;
}

}  // namespace ditattn::cli
