// CONTRACT of DiffusionAttentionBackendEnum: names, values, order, texts and error types are vLLM-Omni's.

#include <fmt/ostream.h>
#include <gtest/gtest.h>

#include <sstream>
#include <unordered_set>

#include "ditattn/registry.hpp"
#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::error_text;
using testing::expect_contains;
using testing::RegistryTest;
using testing::ToyBackend;

const std::string kPrefix = "vllm_omni.diffusion.attention.backends.";

std::vector<std::string> names_of(const std::vector<Enum>& members) {
  std::vector<std::string> names;
  for (Enum member : members) names.push_back(member.name());
  return names;
}

class Members : public RegistryTest {};
class LookUpByName : public RegistryTest {};
class Define : public RegistryTest {};
class GetPath : public RegistryTest {};
class GetClass : public RegistryTest {};
class Override : public RegistryTest {};
class Register : public RegistryTest {};

TEST_F(Members, AreInDefinitionOrderWithCustomLast) {
  const std::vector<std::string> names = names_of(Enum::members());
  const std::vector<std::string> expected = {"FLASH_ATTN", "TORCH_SDPA",      "SAGE_ATTN", "SAGE_ATTN_3",
                                             "CUDNN_ATTN", "FLASHINFER_ATTN", "CUSTOM"};
  ASSERT_GE(names.size(), expected.size());
  EXPECT_EQ(std::vector(names.begin(), names.begin() + 7), expected);
}

TEST_F(Members, ConstantsAreTheMembersOfTheirName) {
  EXPECT_EQ(Enum::FLASH_ATTN.name(), "FLASH_ATTN");
  EXPECT_EQ(Enum::TORCH_SDPA.name(), "TORCH_SDPA");
  EXPECT_EQ(Enum::SAGE_ATTN.name(), "SAGE_ATTN");
  EXPECT_EQ(Enum::SAGE_ATTN_3.name(), "SAGE_ATTN_3");
  EXPECT_EQ(Enum::CUDNN_ATTN.name(), "CUDNN_ATTN");
  EXPECT_EQ(Enum::FLASHINFER_ATTN.name(), "FLASHINFER_ATTN");
  EXPECT_EQ(Enum::CUSTOM.name(), "CUSTOM");
}

TEST_F(Members, ValuesAreTheDefaultClassPaths) {
  EXPECT_EQ(Enum::FLASH_ATTN.value(), kPrefix + "flash_attn.FlashAttentionBackend");
  EXPECT_EQ(Enum::TORCH_SDPA.value(), kPrefix + "sdpa.SDPABackend");
  EXPECT_EQ(Enum::SAGE_ATTN.value(), kPrefix + "sage_attn.SageAttentionBackend");
  EXPECT_EQ(Enum::SAGE_ATTN_3.value(), kPrefix + "sage_attn3.SageAttention3Backend");
  EXPECT_EQ(Enum::CUDNN_ATTN.value(), kPrefix + "cudnn_attn.CuDNNAttentionBackend");
  EXPECT_EQ(Enum::FLASHINFER_ATTN.value(), kPrefix + "flashinfer_attn.FlashInferAttentionBackend");
  EXPECT_EQ(Enum::CUSTOM.value(), "");
}

TEST_F(Members, CompareAndHashByIdentity) {
  EXPECT_EQ(Enum::from_name("SAGE_ATTN"), Enum::SAGE_ATTN);
  EXPECT_NE(Enum::SAGE_ATTN, Enum::SAGE_ATTN_3);
  const std::vector<Enum> members = Enum::members();
  const std::unordered_set<Enum> set(members.begin(), members.end());
  EXPECT_EQ(set.size(), members.size());
  EXPECT_TRUE(set.contains(Enum::from_name("CUDNN_ATTN")));
  EXPECT_EQ(std::hash<Enum>{}(Enum::CUSTOM), std::hash<Enum>{}(Enum::from_name("CUSTOM")));
}

TEST_F(Members, PrintTheirName) {
  std::ostringstream stream;
  stream << Enum::SAGE_ATTN_3;
  EXPECT_EQ(stream.str(), "SAGE_ATTN_3");
  EXPECT_EQ(fmt::format("{}", fmt::streamed(Enum::CUSTOM)), "CUSTOM");
}

TEST_F(LookUpByName, FindsEveryMember) {
  for (Enum member : Enum::members()) EXPECT_EQ(Enum::from_name(member.name()), member);
}

TEST_F(LookUpByName, UnknownNameListsAllMembersInOrder) {
  const std::string text = error_text<UnknownBackendError>([] { Enum::from_name("X"); });
  std::string options;
  for (const std::string& name : names_of(Enum::members())) options += (options.empty() ? "" : ", ") + name;
  EXPECT_EQ(text, "Unknown diffusion attention backend: 'X'. Valid options are: " + options);
  expect_contains(text, {"FLASH_ATTN, TORCH_SDPA, SAGE_ATTN, SAGE_ATTN_3, CUDNN_ATTN, FLASHINFER_ATTN, CUSTOM"});
}

TEST_F(LookUpByName, ListsMembersDefinedAtRunTime) {
  Enum::define("ENUM_TEST_LISTED");
  expect_contains(error_text<ValueError>([] { Enum::from_name("X"); }), {"CUSTOM", "ENUM_TEST_LISTED"});
}

TEST_F(LookUpByName, SpellingIsExact) {
  for (const char* name : {"flash_attn", "Flash_Attn", " FLASH_ATTN", "FLASH_ATTN ", "FLASH", "SDPA", ""}) {
    expect_contains(error_text<UnknownBackendError>([&] { Enum::from_name(name); }),
                    {"Unknown diffusion attention backend: '" + std::string(name) + "'."});
  }
}

TEST_F(Define, AddsAMemberAtTheEnd) {
  const std::size_t before = Enum::members().size();
  const std::string name = testing::unused("ENUM_TEST_ADDED_");
  const Enum member = Enum::define(name, "some.module.Backend");
  EXPECT_EQ(Enum::members().size(), before + 1);
  EXPECT_EQ(Enum::members().back(), member);
  EXPECT_EQ(Enum::from_name(name), member);
  EXPECT_EQ(member.value(), "some.module.Backend");
  EXPECT_FALSE(member.is_overridden());
}

TEST_F(Define, TwiceWithTheSamePathIsTheSameMember) {
  const Enum member = Enum::define("ENUM_TEST_TWICE", "a.b.C");
  const std::size_t before = Enum::members().size();
  EXPECT_EQ(Enum::define("ENUM_TEST_TWICE", "a.b.C"), member);
  EXPECT_EQ(Enum::define("CUSTOM"), Enum::CUSTOM);
  EXPECT_EQ(Enum::members().size(), before);
}

TEST_F(Define, TwiceWithAnotherPathIsAValueError) {
  Enum::define("ENUM_TEST_CLASH", "a.b.C");
  EXPECT_EQ(error_text<ValueError>([] { Enum::define("ENUM_TEST_CLASH", "a.b.D"); }),
            "Backend ENUM_TEST_CLASH is already defined with the path 'a.b.C'; it cannot be defined again with "
            "'a.b.D'. Use register_diffusion_backend to override it.");
  expect_contains(error_text<ValueError>([] { Enum::define("FLASH_ATTN"); }), {"Backend FLASH_ATTN is already"});
  EXPECT_EQ(Enum::from_name("ENUM_TEST_CLASH").value(), "a.b.C");
}

TEST_F(Define, NeedsAName) {
  EXPECT_EQ(error_text<ValueError>([] { Enum::define(""); }), "A backend member needs a name.");
}

TEST_F(Define, PathMayBeEmptyAndIsNotChecked) {
  EXPECT_EQ(Enum::define("ENUM_TEST_EMPTY").value(), "");
  EXPECT_EQ(Enum::define("ENUM_TEST_ODD", "../no/path").value(), "../no/path");
}

TEST_F(GetPath, IsTheDefaultUntilOverridden) {
  EXPECT_EQ(Enum::FLASH_ATTN.get_path(), kPrefix + "flash_attn.FlashAttentionBackend");
  register_diffusion_backend(Enum::FLASH_ATTN, "my.own.Backend");
  EXPECT_EQ(Enum::FLASH_ATTN.get_path(), "my.own.Backend");
  EXPECT_EQ(Enum::FLASH_ATTN.value(), kPrefix + "flash_attn.FlashAttentionBackend");
}

TEST_F(GetPath, WithoutTheClassName) {
  EXPECT_EQ(Enum::TORCH_SDPA.get_path(false), "vllm_omni.diffusion.attention.backends.sdpa");
  register_diffusion_backend(Enum::TORCH_SDPA, "my.own.Backend");
  EXPECT_EQ(Enum::TORCH_SDPA.get_path(false), "my.own");
}

TEST_F(GetPath, EmptyAndUnregisteredIsAValueErrorThatSaysWhatToDo) {
  const std::string expected =
      "Backend CUSTOM must be registered before use. Use "
      "register_diffusion_backend(DiffusionAttentionBackendEnum.CUSTOM, 'your.module.YourClass')";
  EXPECT_EQ(error_text<NotRegisteredError>([] { return Enum::CUSTOM.get_path(); }), expected);
  EXPECT_EQ(error_text<ValueError>([] { return Enum::CUSTOM.get_path(false); }), expected);
  EXPECT_EQ(error_text<ValueError>([] { return Enum::CUSTOM.get_class(); }), expected);
}

TEST_F(GetPath, NamesTheMemberDefinedAtRunTime) {
  const Enum member = Enum::define("ENUM_TEST_NAMELESS");
  EXPECT_EQ(error_text<ValueError>([&] { return member.get_path(); }),
            "Backend ENUM_TEST_NAMELESS must be registered before use. Use "
            "register_diffusion_backend(DiffusionAttentionBackendEnum.ENUM_TEST_NAMELESS, 'your.module.YourClass')");
}

TEST_F(GetPath, EmptyOverrideIsNotAPath) {
  register_diffusion_backend(Enum::CUSTOM, "");
  error_text<NotRegisteredError>([] { return Enum::CUSTOM.get_path(); });
}

TEST_F(GetClass, GivesTheSameClassEveryTime) {
  register_diffusion_backend<ToyBackend>(Enum::SAGE_ATTN);
  const BackendClass first = Enum::SAGE_ATTN.get_class();
  EXPECT_EQ(first->get_name(), "TOY");
  EXPECT_EQ(Enum::SAGE_ATTN.get_class(), first);
  EXPECT_EQ(resolve_class_path(Enum::SAGE_ATTN.get_path()), first);
}

TEST_F(GetClass, FollowsAClassRegisteredAgainUnderItsPath) {
  register_diffusion_backend(Enum::CUSTOM, "enum_test.again.Backend");
  register_backend_class("enum_test.again.Backend", std::make_shared<ToyBackend>("FIRST"));
  const BackendClass first = Enum::CUSTOM.get_class();
  register_backend_class("enum_test.again.Backend", std::make_shared<ToyBackend>("SECOND", 2));
  EXPECT_EQ(Enum::CUSTOM.get_class()->get_name(), "SECOND");
  EXPECT_EQ(testing::toy_answer(*first), 3);  // classes already handed out stay alive
}

TEST_F(GetClass, FailedImportIsAnImportErrorEveryTime) {
  register_diffusion_backend(Enum::FLASH_ATTN, "enum_test.nowhere.Backend");
  const std::string text = error_text<ImportError>([] { return Enum::FLASH_ATTN.get_class(); });
  expect_contains(text, {"Cannot import 'enum_test.nowhere.Backend'", "no such module"});
  EXPECT_EQ(error_text<ImportError>([] { return Enum::FLASH_ATTN.get_class(); }), text);
}

TEST_F(GetClass, BrokenMemberLeavesTheOthersWhole) {
  register_diffusion_backend(Enum::FLASH_ATTN, "enum_test.nowhere.Backend");
  register_diffusion_backend<ToyBackend>(Enum::TORCH_SDPA);
  error_text<ImportError>([] { return Enum::FLASH_ATTN.get_class(); });
  EXPECT_EQ(Enum::TORCH_SDPA.get_class()->get_name(), "TOY");
  EXPECT_EQ(Enum::members()[0].name(), "FLASH_ATTN");
}

TEST_F(Override, IsReportedAndCleared) {
  EXPECT_FALSE(Enum::CUDNN_ATTN.is_overridden());
  register_diffusion_backend(Enum::CUDNN_ATTN, "a.b.C");
  EXPECT_TRUE(Enum::CUDNN_ATTN.is_overridden());
  EXPECT_FALSE(Enum::SAGE_ATTN.is_overridden());
  Enum::CUDNN_ATTN.clear_override();
  EXPECT_FALSE(Enum::CUDNN_ATTN.is_overridden());
  EXPECT_EQ(Enum::CUDNN_ATTN.get_path(), kPrefix + "cudnn_attn.CuDNNAttentionBackend");
}

TEST_F(Override, ClearingWhatIsNotOverriddenDoesNothing) {
  Enum::CUDNN_ATTN.clear_override();
  Enum::CUDNN_ATTN.clear_override();
  EXPECT_EQ(Enum::CUDNN_ATTN.get_path(), Enum::CUDNN_ATTN.value());
}

TEST_F(Override, ClearingGoesBackToTheDefaultsClass) {
  const Enum member = Enum::define("ENUM_TEST_BACK", "enum_test.back.Default");
  register_backend_class("enum_test.back.Default", std::make_shared<ToyBackend>("DEFAULT"));
  register_backend_class("enum_test.back.Other", std::make_shared<ToyBackend>("OTHER"));
  EXPECT_EQ(member.get_class()->get_name(), "DEFAULT");
  register_diffusion_backend(member, "enum_test.back.Other");
  EXPECT_EQ(member.get_class()->get_name(), "OTHER");
  member.clear_override();
  EXPECT_EQ(member.get_class()->get_name(), "DEFAULT");
}

TEST_F(Override, ClearingCustomMakesItUnregisteredAgain) {
  register_diffusion_backend<ToyBackend>(Enum::CUSTOM);
  EXPECT_EQ(Enum::CUSTOM.get_class()->get_name(), "TOY");
  Enum::CUSTOM.clear_override();
  error_text<NotRegisteredError>([] { return Enum::CUSTOM.get_class(); });
}

TEST_F(Override, LastOneWins) {
  register_diffusion_backend(Enum::SAGE_ATTN, "a.b.First");
  register_diffusion_backend(Enum::SAGE_ATTN, "a.b.Second");
  EXPECT_EQ(Enum::SAGE_ATTN.get_path(), "a.b.Second");
}

TEST_F(Register, ByPathChecksNothing) {
  for (const char* path : {"no.such.Module", "../../etc/passwd", "no_dot", "a..b", "a/b.C", "1.2"}) {
    register_diffusion_backend(Enum::CUSTOM, path);
    EXPECT_EQ(Enum::CUSTOM.get_path(), path);
  }
}

TEST_F(Register, ByPathReturnsTheIdentity) {
  const auto identity = register_diffusion_backend(Enum::CUSTOM, "a.b.C");
  int value = 7;
  EXPECT_EQ(&identity(value), &value);
  EXPECT_EQ(*identity(std::make_unique<int>(8)), 8);
}

TEST_F(Register, MalformedPathsAreValueErrorsOfGetClass) {
  for (const char* path : {"no_dot", ".", "a.", ".C", "a..C", "a/b.C", "../a.C", "a.1C", "a b.C", "a.b.C ", "ä.C"}) {
    register_diffusion_backend(Enum::CUSTOM, path);
    expect_contains(error_text<ClassPathError>([] { return Enum::CUSTOM.get_class(); }),
                    {"Class path '" + std::string(path) + "'", "package.module.Class"});
  }
}

TEST_F(Register, MalformedPathIsFoundWhereAClassIsRegisteredUnderIt) {
  register_backend_class("make.<locals>.Backend", std::make_shared<ToyBackend>("LOCAL"));
  register_diffusion_backend(Enum::CUSTOM, "make.<locals>.Backend");
  EXPECT_EQ(Enum::CUSTOM.get_class()->get_name(), "LOCAL");
}

TEST_F(Register, NullClassIsRefused) {
  EXPECT_EQ(error_text<ValueError>([] { register_backend_class("a.b.C", nullptr); }),
            "Cannot register a null class as 'a.b.C'.");
}

}  // namespace
}  // namespace ditattn
