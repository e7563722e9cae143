// The tests of parallel attention, with the processes of an MPI job as ranks.

#include <ditattn/mpi.hpp>
#include <gtest/gtest.h>

#include "tests/parallel/ranks.hpp"

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  const ditattn::parallel::MpiSession mpi(ditattn::parallel::Seconds(60));
  const auto& world = mpi.world();
  auto& ranks = ditattn::parallel::testing::ranks();
  ranks.run = [&](int /*size*/, const ditattn::parallel::testing::Body& body) { body(world); };
  ranks.sizes = {world->size()};
  ranks.is_first = world->rank() == 0;
  ranks.fraction = 2 * world->size();
  auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
  if (!ranks.is_first) delete listeners.Release(listeners.default_result_printer());
  const int status = RUN_ALL_TESTS();
  world->barrier();
  return status;
}
