"""A guest that is a witness of its disk: it has all that it ever wrote there in memory too, and compares the two, past its cache."""

from .counting_guest import counted

BLOCKS, BLOCK = 48, 65_536
"""Blocks of the guest's file, and bytes of each."""

WRITES = f"""
head -c {BLOCKS * BLOCK} /dev/urandom > /run/want; cp /run/want /data/have; sync; echo laid
i=0; while :; do
  j=$((i * 7 % {BLOCKS}))
  if [ $((i % 5)) = 4 ]; then from=/dev/zero; else head -c {BLOCK} /dev/urandom > /run/new; from=/run/new; fi
  for to in /run/want /data/have; do dd if=$from of=$to bs={BLOCK} count=1 seek=$j conv=notrunc 2>/dev/null; done
  sync; echo 3 > /proc/sys/vm/drop_caches
  cmp /run/want /data/have || echo differs
  echo $i; i=$((i+1))
done"""
"""What it does: one block after the other, random or zeros."""


def laid(text: bytes) -> list[int]:
    """Numbers of whole lines, where it has laid its file those after that; it never found a difference."""
    assert b"differs" not in text, text[-500:]
    return counted(text.partition(b"laid")[2].partition(b"\n")[2] if b"laid" in text else text)
