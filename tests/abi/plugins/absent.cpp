// The library that missing_dependency.cpp is linked to.

__attribute__((visibility("default"))) int ditattn_test_absent();
int ditattn_test_absent() { return 1; }
