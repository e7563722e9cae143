#include "registry/class_path.hpp"

#include <gtest/gtest.h>

#include <typeinfo>

#include "ditattn/registry.hpp"
#include "tests/unit/testing.hpp"

struct GlobalClass {};

namespace class_path_test {
struct InNamespace {
  struct Nested {};
};
inline namespace v1 {
struct InInline {};
}  // namespace v1
template <class T>
struct Template {};
namespace {
struct Anonymous {};
}  // namespace
}  // namespace class_path_test

namespace ditattn {
namespace {

using testing::error_text;

TEST(ClassPath, IsModuleAndClass) {
  const ClassPath path = ClassPath::parse("package.module.Class");
  EXPECT_EQ(path.module, "package.module");
  EXPECT_EQ(path.class_name, "Class");
  EXPECT_EQ(path.relative_file(), "package/module.so");
}

TEST(ClassPath, TwoSegmentsAreEnough) {
  const ClassPath path = ClassPath::parse("_m0.C_1");
  EXPECT_EQ(path.module, "_m0");
  EXPECT_EQ(path.class_name, "C_1");
  EXPECT_EQ(path.relative_file(), "_m0.so");
}

TEST(ClassPath, NoDot) {
  EXPECT_EQ(error_text<ClassPathError>([] { ClassPath::parse("Class"); }),
            "Class path 'Class' has no dot. Expected 'package.module.Class'.");
  EXPECT_EQ(error_text<ClassPathError>([] { ClassPath::parse(""); }),
            "Class path '' has no dot. Expected 'package.module.Class'.");
}

TEST(ClassPath, BadSegmentIsQuoted) {
  const std::pair<const char*, const char*> cases[] = {
      {"a..C", ""},
      {".C", ""},
      {"a.", ""},
      {".", ""},
      {"../../x.C", ""},
      {"a/b.C", "a/b"},
      {"a.b/C", "b/C"},
      {"/etc/x.C", "/etc/x"},
      {"a.1b.C", "1b"},
      {"a.b-c.C", "b-c"},
      {"a. b.C", " b"},
      {"a.b.C\n", "C\n"},
      {"a.\xC3\xA4.C", "\xC3\xA4"},
      {"a.<locals>.C", "<locals>"},
  };
  for (const auto& [text, segment] : cases) {
    EXPECT_EQ(error_text<ClassPathError>([&, path = text] { ClassPath::parse(path); }),
              "Class path '" + std::string(text) + "' has the bad segment '" + segment +
                  "'. Segments are letters, digits and underscores, and do not start with a digit: "
                  "'package.module.Class'.");
  }
}

TEST(ClassPath, EmbeddedZeroIsABadSegment) {
  error_text<ClassPathError>([] { ClassPath::parse(std::string("a.b\0.C", 6)); });
}

// Of all single bytes between two letters only letters, digits, "_" and the dot pass: no path can leave its folder.
TEST(ClassPath, NoOtherByteIsEverAccepted) {
  for (int byte = 0; byte < 256; ++byte) {
    const std::string text = std::string("a.x") + static_cast<char>(byte) + "y.C";
    const bool good = byte == '.' || byte == '_' || (byte >= '0' && byte <= '9') || (byte >= 'A' && byte <= 'Z') ||
                      (byte >= 'a' && byte <= 'z');
    if (good) {
      EXPECT_NO_THROW(ClassPath::parse(text)) << byte;
    } else {
      EXPECT_THROW(ClassPath::parse(text), ClassPathError) << byte;
    }
  }
}

TEST(ClassPathOf, QualifiedNameWithDots) {
  EXPECT_EQ(detail::class_path_of(typeid(GlobalClass)), "GlobalClass");
  EXPECT_EQ(detail::class_path_of(typeid(class_path_test::InNamespace)), "class_path_test.InNamespace");
  EXPECT_EQ(detail::class_path_of(typeid(class_path_test::InNamespace::Nested)), "class_path_test.InNamespace.Nested");
  EXPECT_EQ(detail::class_path_of(typeid(class_path_test::InInline)), "class_path_test.v1.InInline");
}

TEST(ClassPathOf, AnonymousTemplateAndLocalClassesHaveAPathToo) {
  struct Local {};
  EXPECT_EQ(detail::class_path_of(typeid(class_path_test::Anonymous)),
            "class_path_test.(anonymous namespace).Anonymous");
  EXPECT_EQ(detail::class_path_of(typeid(class_path_test::Template<class_path_test::InNamespace>)),
            "class_path_test.Template<class_path_test.InNamespace>");
  const std::string local = detail::class_path_of(typeid(Local));
  EXPECT_EQ(local.find("::"), std::string::npos) << local;
  EXPECT_EQ(local.substr(local.size() - 6), ".Local") << local;
}

}  // namespace
}  // namespace ditattn
