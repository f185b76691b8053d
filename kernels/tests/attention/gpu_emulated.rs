//! The tensor-core kernels as CUDA C++, run on the CPU by `cuda/emulate.hpp`.
//!
//! This is the code that NVRTC would get, with the tensor cores' instructions written out in C++ as
//! the PTX manual defines them: fragments, ldmatrix, asynchronous copies and their barrier. What it
//! cannot show is speed, and what a real device does beyond the manual. Where there is no C++
//! compiler (`c++`, or CXX), the tests are skipped; in CI they fail.

use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::{DType, bf16};
use hypercast_kernels::attention::AttentionWindow;
use hypercast_kernels::cpu::{self, Isa, StridedRows};
use hypercast_kernels::gpu::source::{
    BiasTables, MmaKernel, PlanRequest, cuda, nvidia, plan, work,
};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::case::{AttentionCase, CaseOptions, CaseRecipe, CaseValues};
use crate::skip;

/// Shared memory of a workgroup on an H100 and on an A100, and on a device with little.
const H100: usize = 227 << 10;
const A100: usize = 163 << 10;
const SMALL: usize = 48 << 10;

/// The C++ compiler, if there is one.
///
/// # Panics
/// If there is none, in CI.
fn compiler() -> Option<String> {
    let name = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let found = Command::new(&name).arg("--version").output().is_ok_and(|run| run.status.success());
    if !found {
        skip("emulated CUDA kernels", &format!("there is no C++ compiler `{name}`"));
    }
    found.then_some(name)
}

/// A buffer of a launch.
struct Buffer {
    /// Bytes of an element.
    size: usize,
    /// None of an array.
    extents: Vec<usize>,
    words: Vec<u32>,
    len: usize,
}

impl Buffer {
    fn of_bf16(values: &[f32], extents: &[usize]) -> Buffer {
        let mut bits: Vec<u16> = values.iter().map(|x| bf16::from_f32(*x).to_bits()).collect();
        bits.resize(values.len().next_multiple_of(2), 0);
        let words = bits.chunks(2).map(|two| u32::from(two[0]) | u32::from(two[1]) << 16).collect();
        Buffer { size: 2, extents: extents.to_vec(), words, len: values.len() }
    }

    /// One to be written; its values are NaN before.
    fn out(size: usize, extents: [usize; 2]) -> Buffer {
        let len = extents.iter().product::<usize>();
        let words = vec![u32::MAX; (len * size).div_ceil(4)];
        Buffer { size, extents: extents.to_vec(), words, len }
    }

    fn values(&self) -> Vec<f32> {
        let one = |at: usize| match self.size {
            2 => bf16::from_bits((self.words[at / 2] >> (at % 2 * 16)) as u16).to_f32(),
            _ => f32::from_bits(self.words[at]),
        };
        (0..self.len).map(one).collect()
    }
}

/// What a kernel is run for.
struct EmulatedRun<'a> {
    kernel: MmaKernel,
    case: &'a AttentionCase,
    shared_bytes: usize,
    /// Whether copies arrive at the last moment, and not at once.
    late: bool,
    compiler: &'a str,
    folder: &'a Path,
}

impl EmulatedRun<'_> {
    fn outputs(&self) -> Vec<Buffer> {
        let AttentionCase { shape, inputs, qk, v, .. } = self.case;
        let tables =
            BiasTables { position: inputs.position.is_some(), time: inputs.time.is_some() };
        let device = nvidia(self.shared_bytes);
        let wanted = PlanRequest {
            qk: *qk,
            v: *v,
            dtype: DType::BF16,
            position: tables.position,
            aligned: qk % 8 == 0 && v % 8 == 0,
        };
        let plan = plan(self.kernel, &wanted, &device).expect("a plan that fits");
        assert!(plan.tensor_cores);
        let source = cuda(self.kernel, plan, tables, &device).expect("CubeCL lowers it");
        assert!(source.shared_bytes <= self.shared_bytes);

        let rows = shape.rows();
        let of_qk = [rows, shape.heads * qk];
        let of_v = [rows, shape.heads * v];
        let (words, groups) = work(self.kernel, plan, shape);
        let mut buffers = vec![
            Buffer::of_bf16(&inputs.q, &of_qk),
            Buffer::of_bf16(&inputs.k, &of_qk),
            Buffer::of_bf16(&inputs.v, &of_v),
        ];
        let mut entries = 0;
        for table in [&inputs.position, &inputs.time].into_iter().flatten() {
            buffers.push(Buffer::of_bf16(table, &[table.len()]));
            entries += table.len();
        }
        buffers.push(Buffer { size: 4, extents: vec![], len: words.len(), words });
        let read = buffers.len() + usize::from(self.kernel != MmaKernel::Forward);
        match self.kernel {
            MmaKernel::Forward => buffers.push(Buffer::out(2, of_v)),
            MmaKernel::BackwardQueries => {
                buffers.push(Buffer::of_bf16(&self.case.grad(), &of_v));
                buffers.push(Buffer::out(2, of_qk));
                buffers.push(Buffer::out(4, [groups * shape.heads, entries.max(1)]));
            }
            MmaKernel::BackwardKeys => {
                buffers.push(Buffer::of_bf16(&self.case.grad(), &of_v));
                buffers.push(Buffer::out(2, of_qk));
                buffers.push(Buffer::out(2, of_v));
            }
        }

        let everything = 1 << 30;
        let (recent, global) = shape.window.map_or((everything, 0), |w| (w.recent, w.global));
        let scalars = [groups, rows, recent, global, *qk, *v].map(|value| value as u32);
        let mut launch = vec![groups as u32, shape.heads as u32, plan.units() as u32];
        launch.extend([shape.alpha.to_bits(), (1.0 / shape.norm).to_bits()]);
        launch.extend(scalars);
        launch.push(buffers.len() as u32);
        for buffer in &buffers {
            launch.extend([buffer.size as u32, buffer.extents.len() as u32]);
            launch.extend(buffer.extents.iter().map(|extent| *extent as u32));
            launch.push(buffer.len as u32);
            launch.extend(&buffer.words);
        }
        let found = self.execute(&source.code, &launch, buffers.len());
        let mut at = 0;
        for buffer in &mut buffers {
            let end = at + buffer.words.len();
            buffer.words.copy_from_slice(&found[at..end]);
            at = end;
        }
        buffers.split_off(read)
    }

    /// Compiles the kernel and runs it; gives the words of all buffers.
    fn execute(&self, code: &str, launch: &[u32], buffers: usize) -> Vec<u32> {
        let name = match self.kernel {
            MmaKernel::Forward => "forward",
            MmaKernel::BackwardQueries => "backward_queries",
            MmaKernel::BackwardKeys => "backward_keys",
        };
        let types = code.find("typedef").expect("CubeCL's types");
        let wrappers = [code.find("// Wrapper"), code.find("inline __device__")];
        let wrappers = wrappers.into_iter().flatten().min().expect("instructions in assembly");
        let kernel = code.find("extern \"C\" __global__").expect("a kernel");
        let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/emulate.hpp");
        // A void pointer becomes whatever the kernel takes there.
        let arguments: String = (0..buffers).map(|i| format!(", Any{{b({i})}}")).collect();
        let any = "struct Any { void *at; template <class T> operator T *() { return (T *)at; } };";
        let program = format!(
            "#include \"{}\"\n{}\n{}\n{any}\nEMULATE({name}{arguments})\n",
            header.display(),
            &code[types..wrappers],
            &code[kernel..].replace(&format!("{name} ("), &format!("{name}(")),
        );
        let path = |extension: &str| self.folder.join(name).with_extension(extension);
        std::fs::write(path("cpp"), program).expect("a writable folder");
        let bytes: Vec<u8> = launch.iter().flat_map(|word| word.to_le_bytes()).collect();
        std::fs::write(path("in"), bytes).expect("a writable folder");
        let built = Command::new(self.compiler)
            .args(["-std=c++17", "-O1", "-w", "-o"])
            .args([path("bin"), path("cpp")])
            .output()
            .expect("the compiler starts");
        let errors = String::from_utf8_lossy(&built.stderr);
        assert!(built.status.success(), "{name}: {}", errors.lines().next().unwrap_or_default());
        let mut run = Command::new(path("bin"));
        run.args([path("in"), path("out")]);
        if self.late {
            run.env("EMULATE_LATE", "1");
        }
        let run = run.output().expect("the program starts");
        assert!(run.status.success(), "{name}: {}", String::from_utf8_lossy(&run.stderr));
        let bytes = std::fs::read(path("out")).expect("all buffers");
        bytes.chunks(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }
}

/// The case with inputs that bf16 holds.
fn rounded(mut case: AttentionCase) -> AttentionCase {
    let round = |x: f32| bf16::from_f32(x).to_f32();
    case.inputs = case.inputs.map(|values| values.into_iter().map(round).collect());
    case
}

/// The gradients of the case for the output gradient as bf16 holds it.
fn expected_grads(case: &AttentionCase) -> CaseValues {
    let grad: Vec<f32> = case.grad().iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
    let grad = StridedRows { data: &grad, stride: case.shape.heads * case.v };
    cpu::backward(&case.shape, case.dims(), &case.borrow(), grad, Isa::best())
}

/// Weights and outputs round to bf16 by up to 2^-9 of themselves, each weight on its own, so that
/// a sum is off by less than the largest sum there is, times 2^-7.
fn assert_near(what: &str, found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    let most = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let apart = (f64::from(*found) - expected).abs();
        assert!(apart <= most / 128.0 + 1e-6, "{what}: at {at}, {found} should be {expected}");
    }
}

fn assert_right(case: AttentionCase, shared_bytes: usize) {
    let Some(compiler) = compiler() else { return };
    let case = &rounded(case);
    let wide = |values: &[f32]| values.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    let grads = expected_grads(case);
    for late in [false, true] {
        let name = format!("emulated-{shared_bytes}-{}-{}-{late}", case.qk, case.v);
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&folder).expect("a writable folder");
        let (compiler, folder) = (&compiler[..], folder.as_path());
        let run =
            |kernel| EmulatedRun { kernel, case, shared_bytes, late, compiler, folder }.outputs();
        let what = |of: &str| format!("{of}: {}, copies late: {late}", case.name);
        let out = run(MmaKernel::Forward);
        assert_near(&what("out"), &out[0].values(), &case.oracle());
        let found = run(MmaKernel::BackwardKeys);
        assert_near(&what("dk"), &found[0].values(), &wide(&grads.k));
        assert_near(&what("dv"), &found[1].values(), &wide(&grads.v));
        let found = run(MmaKernel::BackwardQueries);
        assert_near(&what("dq"), &found[0].values(), &wide(&grads.q));
        let tables = [&grads.position, &grads.time].into_iter().flatten();
        let expected: Vec<f32> = tables.flatten().copied().collect();
        if !expected.is_empty() {
            let mut sums = vec![0.0f32; expected.len()];
            for row in found[1].values().chunks(expected.len()) {
                sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
            }
            assert_near(&what("tables"), &sums, &wide(&expected));
        }
        std::fs::remove_dir_all(folder).expect("what was just written");
    }
}

#[test]
fn gpu_emulated_on_an_h100_plan_is_right() {
    let mut rng = SmallRng::seed_from_u64(41);
    let recipe = CaseRecipe { requests: &[(150, 70), (3, 0), (0, 2)], heads: 2, qk: 32, v: 32 };
    assert_right(AttentionCase::new(&mut rng, &recipe, CaseOptions::default()), H100);
}

#[test]
fn gpu_emulated_with_tables_and_a_window_is_right() {
    let mut rng = SmallRng::seed_from_u64(42);
    let recipe = CaseRecipe { requests: &[(200, 9)], heads: 1, qk: 24, v: 40 };
    let window = Some(AttentionWindow { recent: 70, global: 5 });
    assert_right(
        AttentionCase::new(&mut rng, &recipe, CaseOptions { window, position: 60, time: 20 }),
        SMALL,
    );
}

#[test]
fn gpu_emulated_with_the_widest_heads_is_right() {
    let mut rng = SmallRng::seed_from_u64(43);
    // Two warps share each row's columns, and widths are no multiples of 16 bytes.
    let recipe = CaseRecipe { requests: &[(70, 3)], heads: 1, qk: 256, v: 250 };
    assert_right(AttentionCase::new(&mut rng, &recipe, CaseOptions::default()), A100);
}
