"""The house: who may import whom, and how long files and functions may be."""

import ast

import pytest
from conftest import ROOT

FLOORS = {
    "terminal": 1,
    "common_utils_v32": 1,
    "checkpoint_files": 1,
    "file_claims": 1,
    "compute_devices": 1,
    "attention_windows": 1,
    "spectral_layers": 1,
    "sparse_attention": 1,
    "camera_colour": 1,
    "measured_spectra": 1,
    "cube_files": 1,
    "raster_files": 1,
    "array_files": 1,
    "hsifusion_v252_complete": 2,
    "sharp_v322_hardened": 2,
    "scene_folders": 2,
    "cube_preparation": 2,
    "synthetic_scenes": 2,
    "training_runs": 2,
    "photo_files": 2,
    "optimized_dataloader": 3,
    "spectral_evaluation": 3,
    "frame_prediction": 3,
    "model_export": 4,
    "evaluation_report": 4,
    "round_trip": 4,
    "training_state": 5,
    "dataset_setup": 6,
    "hsifusion_training": 6,
    "sharp_training_script_fixed": 6,
    "sharp_inference": 6,
}
WRITERS = ("atomic_write", "temporary_prefix", "to_json")
OPEN_TO_NEIGHBOURS = {("common_utils_v32", name) for name in ("UserError", "opt", *WRITERS)}
OPEN_TO_NEIGHBOURS |= {("terminal", ""), ("terminal", "CliParser")}
OPEN_TO_NEIGHBOURS |= {("compute_devices", "free_memory")}
CLAIMS = ("check_claim", "check_claims", "open_image", "read_packed")
OPEN_TO_NEIGHBOURS |= {("file_claims", name) for name in CLAIMS}
FORMATS = ("raster_files", "array_files")  # rooms whose only door is cube_files
MODELS = ("hsifusion_v252_complete", "sharp_v322_hardened")
DATA_CODE = (
    *FORMATS,
    "cube_files",
    "cube_preparation",
    "measured_spectra",
    "scene_folders",
    "synthetic_scenes",
    "camera_colour",
    "training_runs",
    "training_state",
)
FILES = sorted(ROOT.glob("*.py"))


def project_imports(path):
    """(module, name) of all that a file imports from the project, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in FLOORS:
            found |= {(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name in FLOORS}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_imports_from_lower_floors_only(path):
    floor = FLOORS[path.stem]
    for module, name in project_imports(path):
        shared = floor == 1 and (module, name) in OPEN_TO_NEIGHBOURS
        if module in FORMATS:
            shared = path.stem == "cube_files"
            floor = 1
        assert FLOORS[module] < floor or shared, f"{path.stem} imports {name} from {module}"


@pytest.mark.parametrize("model", MODELS)
def test_a_model_imports_no_data_code(model):
    modules = {module for module, _ in project_imports(ROOT / f"{model}.py")}
    assert not modules & set(DATA_CODE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_and_its_functions_fit(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 50, f"{node.name} has {lines} lines"
