"""The protocols of the benches: what they read, what they refuse, and on the data themselves where they are there."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from tools.bench import openb, vbp

NODES = "sn,cpu_milli,memory_mib,gpu,model\na,8000,100,2,T4\nb,8000,100,4,G2\n"
PODS = "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\np0,1000,1,1,460,\np1,2000,1,1,1000,T4\np2,1000,1,2,1000,\np3,500,1,0,0,T4\n"


def made(folder: Path, pods: str = PODS, nodes: str = NODES) -> openb.Trace:
    (folder / "nodes.csv").write_text(nodes)
    (folder / "openb_pod_list_made.csv").write_text(pods)
    return openb.read(folder / "nodes.csv", folder / "openb_pod_list_made.csv")


def test_a_list_is_read(tmp_path: Path) -> None:
    trace = made(tmp_path)
    assert (trace.name, trace.total, trace.asks.tolist()) == ("made", 6000, [460, 1000, 2000, 0])
    assert trace.kinds.access.tolist() == [[True, True], [False, True], [True, True], [True, True]]  # models in order: G2, T4; without a GPU the model plays no part


def test_arrivals_follow_the_protocol(tmp_path: Path) -> None:
    trace = made(tmp_path)
    order, nodes = openb.arrivals(trace, 42)
    assert sorted(order[:4]) == [0, 1, 2, 3]
    assert sorted(nodes) == [0, 1]
    per_gpu = trace.kinds.milli[trace.kind_of[order[4:]]].sum()
    assert trace.asks.sum() + per_gpu <= openb.TUNE * trace.total
    assert (order == openb.arrivals(trace, 42)[0]).all()
    assert len(order) != len(openb.arrivals(trace, 43)[0]) or (order != openb.arrivals(trace, 43)[0]).any()


def test_too_long_a_list_is_cut(tmp_path: Path) -> None:
    trace = made(tmp_path, PODS + "".join(f"q{at},1,1,1,1000,\n" for at in range(20)))
    order, _ = openb.arrivals(trace, 1)
    assert trace.asks[trace.kind_of[order]].sum() <= openb.TUNE * trace.total


def test_the_allocation_is_read_at_rounded_arrivals() -> None:
    found = openb.allocation(np.array([945, 951, 954, 1001, 1299]), np.array([900, 910, 920, 930, 940]), 1000)
    assert found == {95: pytest.approx(91.5), 100: pytest.approx(93.0), 130: pytest.approx(94.0)}


@pytest.mark.parametrize(
    ("pods", "said"),
    [(PODS.replace("460", "x"), "line 2: gpu_milli is 'x'; give a whole number"), (PODS.replace("gpu_milli", "milli"), "column gpu_milli is missing"), ("cpu_milli\n", "no rows"), (PODS.replace("2,1000,", "2,500,"), r"kinds.milli\[2\]")],
)
def test_bad_lists_are_named(tmp_path: Path, pods: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(tmp_path, pods)


def test_seeds() -> None:
    assert openb.seeds_of("42-44") == [42, 43, 44]
    assert openb.seeds_of("1,5") == [1, 5]


@pytest.mark.skipif(not openb.DATA.is_dir(), reason=f"the openb lists are not in {openb.DATA} (set NOVACRON_DATA)")
def test_the_published_list_has_the_published_totals() -> None:
    trace = openb.read(openb.DATA / "openb_node_list_gpu_node.csv", openb.DATA / "openb_pod_list_default.csv")
    assert (len(trace.machines), trace.total, len(trace.pods)) == (1213, 6_212_000, 8152)
    assert trace.asks[trace.kind_of].sum() / 1000 == pytest.approx(6086.8, abs=0.1)


def test_an_instance_is_read_with_its_demands() -> None:
    assert vbp.parse("one", "2\n10 20\n2\n1 2 3\n4 5 1\n") == ([10, 20], [[1, 2], [1, 2], [1, 2], [4, 5]])


@pytest.mark.parametrize(("text", "said"), [("2 10 20 2 1 2 3", "one: 2 lines of 3 numbers are announced, 3 numbers follow"), ("2 10", "give the dimensions"), ("1 5 1 x 1", "give whole numbers"), ("1 5 1 2 -1", "demands must be")])
def test_bad_instances_are_named(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        vbp.parse("one", text)


def test_folders_and_archives_give_the_same_instances(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "b_1.vbp").write_text("1 5 1 2 1")
    (tmp_path / "set" / "a_1.vbp").write_text("1 5 1 3 1")
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "set", "set")
    assert list(vbp.instances(tmp_path / "set")) == list(vbp.instances(tmp_path / "set.tar.gz")) == [("a_1", "1 5 1 3 1"), ("b_1", "1 5 1 2 1")]


@pytest.mark.parametrize("separator", ["\t", ","])
def test_published_results_are_read_with_either_separator(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "r.csv"
    path.write_text("\ufeffinstance_name,LB,OPT,best_overall\na_1,1,2,3\nb_1,1,-1,3\n".replace(",", separator))
    assert vbp.published(path) == {"a_1": vbp.Known(2, 3), "b_1": vbp.Known(None, 3)}
