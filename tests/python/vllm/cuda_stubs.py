"""Stand-ins for the CUDA libraries that PyPI's torch is linked to, so that a machine without a GPU can import it.

    torch/lib/*.so ──objdump──► NEEDED libcublas.so.13, …   ┐
                                undefined cublasCreate_v2@… ┴► stub.c ──gcc──► nvidia/cu13/lib/libcublas.so.13, …

The real ones are 3 GB of wheels whose code a CPU engine never runs; the dynamic linker, however, wants every NEEDED
library and every symbol to exist when torch is loaded. A stand-in defines the symbols that torch itself names, under
the versions it names, and each returns an error. Registration of kernels at load time does nothing; "how many devices"
answers none.

    python cuda_stubs.py SITE_PACKAGES
"""

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

LIBRARY = re.compile(r"lib(cu|nccl|nv)[\w.+-]*\.so[\w.]*")
SYMBOL = re.compile(r"(cu|__cuda|nccl|nv)\w*")
NO_DEVICE = 100  # cudaErrorNoDevice

# What runs while torch is imported; everything else only has to exist.
BODIES = {
    "__cudaRegisterFatBinary": "static void *none; void **__cudaRegisterFatBinary(void *binary) { return &none; }",
    "cudaGetDeviceCount": f"int cudaGetDeviceCount(int *count) {{ *count = 0; return {NO_DEVICE}; }}",
    "cudaGetErrorString": 'const char *cudaGetErrorString(int error) { return "no CUDA here: a stand-in"; }',
    "cudaGetErrorName": 'const char *cudaGetErrorName(int error) { return "cudaErrorNoDevice"; }',
    "cudaDriverGetVersion": "int cudaDriverGetVersion(int *version) { *version = 0; return 0; }",
    "cudaRuntimeGetVersion": "int cudaRuntimeGetVersion(int *version) { *version = 0; return 0; }",
    "cudaGetLastError": "int cudaGetLastError(void) { return 0; }",
    "cudaPeekAtLastError": "int cudaPeekAtLastError(void) { return 0; }",
}


def body(symbol: str) -> str:
    if symbol in BODIES:
        return BODIES[symbol]
    if symbol.startswith("__cuda"):  # registration of kernels, by constructors
        return f"void {symbol}(void) {{}}"
    return f'int {symbol}(void) {{ fprintf(stderr, "CUDA stand-in called: {symbol}\\n"); return {NO_DEVICE}; }}'


def objdump(flag: str, library: Path) -> str:
    return subprocess.run(["objdump", flag, library], capture_output=True, text=True, check=True).stdout


def wanted(site_packages: Path) -> tuple[set[str], dict[str, set[str]], dict[str, str]]:
    """The libraries torch lacks, the symbols it wants of them by version ("" for none), and each version's library."""
    torch = site_packages / "torch"
    own = sorted(torch.glob("lib/*.so*")) + sorted(torch.glob("*.so"))
    needed, symbols, home = set(), defaultdict(set), {}
    for library in own:
        headers = objdump("-p", library)
        needed.update(name for name in re.findall(r"NEEDED\s+(\S+)", headers) if LIBRARY.fullmatch(name))
        for name, versions in re.findall(r"required from (\S+):\n((?:\s+0x.*\n)+)", headers):
            home.update((version, name) for version in re.findall(r"(\S+)\n", versions))
        for line in objdump("-T", library).splitlines():
            if "*UND*" not in line:
                continue
            version, symbol = re.split(r"\*UND\*\s+\S+", line)[1].split()[-2:]
            if SYMBOL.fullmatch(symbol):
                symbols["" if version == "Base" else version.strip("()")].add(symbol)
    # The driver is opened by name at run time, when there is one.
    return needed - {library.name for library in own} - {"libcuda.so.1"}, symbols, home


def main(site_packages: Path) -> None:
    libraries, symbols, home = wanted(site_packages)
    if not libraries:
        sys.exit("torch needs no CUDA library: not the build these stand-ins are for")
    folder = site_packages / "nvidia" / "cu13" / "lib"  # where torch's own run path looks
    folder.mkdir(parents=True, exist_ok=True)
    for library in sorted(libraries):
        # A symbol without a version may be looked for anywhere, so each stand-in has them all.
        versions = {version: names for version, names in symbols.items() if not version or home.get(version) == library}
        names = sorted(set().union(*versions.values()))
        with tempfile.TemporaryDirectory() as scratch:
            source, script = Path(scratch, "stub.c"), Path(scratch, "stub.map")
            source.write_text("#include <stdio.h>\n" + "\n".join(map(body, names)) + "\n")
            script.write_text("".join(f"{v} {{ {'; '.join(sorted(n))}; }};\n" for v, n in versions.items() if v))
            built = Path(scratch, library)
            command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library}", "-o", built, source]
            if script.stat().st_size:
                command.append(f"-Wl,--version-script={script}")
            subprocess.run(command, check=True)
            fresh = folder / f"{library}.new"
            fresh.write_bytes(built.read_bytes())
            fresh.replace(folder / library)  # a process that has the old one mapped keeps it
    print(f"stand-ins for {len(libraries)} CUDA libraries in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
