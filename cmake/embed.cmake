# Text files as part of a binary, so that data needs no path at run time.
#
#   ditattn_embed_text(<target> <file> <function>)
#
# adds a generated source to <target> that defines `std::string_view ditattn::<function>()`: the file's content. The
# source lies in the build folder and is written again whenever the file changes.
#
# The text becomes raw string literals of whole lines, each shorter than what every compiler takes (C++ promises 64 KiB,
# MSVC 16 KB), joined on the first call. Rejected: `ld -r -b binary` and `.incbin` (not portable), C++23's #embed.
function(ditattn_embed_text target file function)
  cmake_path(ABSOLUTE_PATH file BASE_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR})
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${file})
  file(READ ${file} text)
  if(text MATCHES "\\)text\"")
    message(FATAL_ERROR "${file} contains )text\", which ends the raw string literal it would become")
  endif()

  set(limit 12000)
  set(pieces "")
  string(LENGTH "${text}" left)
  while(left GREATER 0)
    string(SUBSTRING "${text}" 0 ${limit} piece)
    string(FIND "${piece}" "\n" end REVERSE)
    if(left LESS_EQUAL limit)
      set(end ${left})
    elseif(end EQUAL -1)
      message(FATAL_ERROR "${file} has a line of more than ${limit} bytes, too long for one string literal")
    else()
      math(EXPR end "${end} + 1")
    endif()
    string(SUBSTRING "${text}" 0 ${end} piece)
    string(SUBSTRING "${text}" ${end} -1 text)
    string(LENGTH "${text}" left)
    string(APPEND pieces "    R\"text(${piece})text\",\n")
  endwhile()

  cmake_path(GET file FILENAME name)
  set(content "// Generated from ${name}.\n#include <string>\n#include <string_view>\n\nnamespace ditattn {\n
namespace {
constexpr std::string_view kPieces[] = {
${pieces}};
}  // namespace

std::string_view ${function}();
std::string_view ${function}() {
  static const std::string text = [] {
    std::string joined;
    for (std::string_view piece : kPieces) joined += piece;
    return joined;
  }();
  return text;
}

}  // namespace ditattn\n")
  # Written only when it differs, so that configuring again compiles nothing again.
  set(source ${CMAKE_CURRENT_BINARY_DIR}/${name}.cpp)
  set(old "")
  if(EXISTS ${source})
    file(READ ${source} old)
  endif()
  if(NOT old STREQUAL content)
    file(WRITE ${source} "${content}")
  endif()
  target_sources(${target} PRIVATE ${source})
endfunction()
