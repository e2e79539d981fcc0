"""The package's own stores pass the conformance kit that users have for theirs."""

import pytest

from asyncidem.testing import FaultyStore, StoreConformance

from stores.stores_under_test import Subject

# Of each way to the data one: the kinds that are left out differ in what other tests look at.
KINDS = ("memory", "valkey", "valkey-plain", "cluster", "fake", "fake-without-lua", "client")


@pytest.mark.parametrize("subject", KINDS, indirect=True)
async def test_every_store_keeps_the_contract(subject: Subject) -> None:
    """In memory, on a server, multiplexed and not, on a cluster, on fakeredis with and without scripts, over a client."""
    await StoreConformance(subject.another).run()


@pytest.mark.parametrize("subject", ["valkey"], indirect=True)
async def test_a_faulty_store_without_faults_keeps_it(subject: Subject) -> None:
    """What stands before a store changes nothing of it."""
    await StoreConformance(lambda: FaultyStore(subject.another(), turns=1)).run()
