#pragma once

#include <ditattn/plugin.hpp>

/// Classes of the good plug-in, which is also linked into the test program.
ditattn::BackendClass find_good(std::string_view class_name);

/// Capabilities with every field away from its default.
ditattn::Capabilities odd_capabilities();
