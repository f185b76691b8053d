//! The faults of guests. A fault is data: it degrades a request but never fails it.

use std::collections::HashSet;
use std::fmt;

/// The function that was called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    /// `describe`, at load.
    Describe,
    /// `network`, at load.
    Network,
    /// `rank`, for a request.
    Rank,
    /// `labels`, in training.
    Labels,
    /// `weights`, in training.
    Weights,
    /// `sample`, in training.
    Sample,
    /// `schedule`, before a step of training.
    Schedule,
    /// `evaluate`, or `evaluate-rows` in its place, before a publication or in a canary.
    Evaluate,
    /// `validation-score`, after a pass of training.
    ValidationScore,
    /// The host's run of the expert's network.
    Predict,
}

impl Call {
    /// Each, in the order in which they are declared.
    pub(super) const ALL: [Call; 10] = [
        Call::Describe,
        Call::Network,
        Call::Rank,
        Call::Labels,
        Call::Weights,
        Call::Sample,
        Call::Schedule,
        Call::Evaluate,
        Call::ValidationScore,
        Call::Predict,
    ];
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Call::Predict => f.write_str("the network"),
            Call::ValidationScore => f.write_str("validation-score"),
            // The other functions of the contract are called like the variants.
            function => f.write_str(&format!("{function:?}").to_lowercase()),
        }
    }
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The guest trapped: a panic, an index out of bounds, a division by zero.
    #[error("trapped: {0}")]
    Trap(String),
    /// The guest ran past its deadline, in milliseconds.
    #[error("ran past its deadline of {0} ms")]
    Deadline(u32),
    /// The guest needed more linear memory than its limit, in MiB.
    #[error("asked for more than its {0} MiB of memory")]
    Memory(u32),
    /// The guest needed a larger function table than its limit of entries.
    #[error("asked for more than its {0} entries of a table")]
    Table(usize),
    /// The guest's call stack overflowed.
    #[error("overflowed its call stack")]
    StackOverflow,
    /// The guest, or its network, returned a value that the contract forbids.
    #[error("gave a bad output: {0}")]
    BadOutput(String),
    /// The guest returned an error of its own.
    #[error("returned an error: {0}")]
    Refused(String),
    /// The plugin's limit of concurrent calls, or the size of the instance pool, was reached.
    #[error("is busy: {0}")]
    Busy(String),
    /// The breaker is open after repeated faults; the guest was not called.
    #[error("was not called: its breaker is open after repeated faults")]
    Open,
    /// The last requests of this user ended in faults; the guest was not called.
    #[error("was not called: the last requests of this user ended in faults")]
    UserSetAside,
}

impl Fault {
    /// The cause as a metrics label.
    pub fn label(&self) -> &'static str {
        match self {
            Fault::Trap(_) => "trap",
            Fault::Deadline(_) => "deadline",
            Fault::Memory(_) => "memory",
            Fault::Table(_) => "table",
            Fault::StackOverflow => "stack_overflow",
            Fault::BadOutput(_) => "bad_output",
            Fault::Refused(_) => "refused",
            Fault::Busy(_) => "busy",
            Fault::Open => "breaker_open",
            Fault::UserSetAside => "user_set_aside",
        }
    }
}

/// A fault with its plugin and call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expert `{plugin}`: `{call}` {cause}")]
pub struct ExpertFault {
    /// The plugin's name: its description's, or its file's before that is known.
    pub plugin: String,
    /// The call that failed.
    pub call: Call,
    /// Why it failed.
    pub cause: Fault,
    /// The guest's functions on the stack then, innermost first; empty if none was running.
    pub trace: Vec<String>,
}

impl ExpertFault {
    /// What the author changes, and what the fault means to who operates the host.
    pub fn advice(&self) -> String {
        let author = match &self.cause {
            Fault::Trap(_) => "corrects the code that the message and the functions name",
            Fault::Deadline(_) => "does less in this call: `cargo hypercast bench` shows its time",
            Fault::Memory(_) | Fault::Table(_) => {
                "keeps less in memory: `cargo hypercast bench` shows what a call needs"
            }
            Fault::StackOverflow => "ends the recursion, or moves large values to the heap",
            Fault::BadOutput(_) => "returns what the contract asks for",
            Fault::Refused(_) => "answers this case too, or removes what it refuses",
            Fault::Busy(_) => "makes the call shorter, if this comes often",
            Fault::Open | Fault::UserSetAside => "corrects the faults before this one",
        };
        let operator = match self.call {
            Call::Describe | Call::Network => {
                "none of it runs, and the version of before serves, or the FM's ranking answers"
            }
            Call::Rank | Call::Predict => "the FM's ranking answers the request",
            Call::Labels | Call::Weights | Call::Sample => "the request trains nothing",
            Call::Schedule => "the step is made at the configured learning rate",
            Call::Evaluate => "nothing is published, and what serves goes on serving",
            Call::ValidationScore => "the training ends, and what serves goes on serving",
        };
        format!(
            "Its author {author}, and meets the fault in `cargo hypercast test`; to operators it \
             means that {operator}"
        )
    }

    /// A fault without a trace.
    pub(crate) fn new(plugin: &str, call: Call, cause: Fault) -> ExpertFault {
        ExpertFault { plugin: plugin.to_owned(), call, cause, trace: Vec::new() }
    }

    /// The trace as lines that follow a message, one a function; empty without a trace.
    pub fn backtrace(&self) -> String {
        self.trace.iter().map(|function| format!("\n    in {function}")).collect()
    }
}

/// The part of the address space, in bytes, below a memory whose end is at 2^32.
const BELOW_MEMORY: u64 = 256 << 20;

/// Whether an access out of bounds is an overflow of the guest's own stack. A guest keeps its large
/// local values in a stack that grows down to the start of its memory: the access is just below
/// that, or it copies a block in a deep recursion, for which no address is told.
pub(super) fn overflows_own_stack(error: &wasmtime::Error) -> bool {
    // wasmtime tells the address only in its text, in a context of the trap.
    let address = |text: String| {
        let (_, rest) = text.split_once("memory fault at wasm address 0x")?;
        u64::from_str_radix(rest.split(' ').next()?, 16).ok()
    };
    let mut addresses = error.chain().filter_map(|cause| address(cause.to_string()));
    addresses.any(|address| address >= (1 << 32) - BELOW_MEMORY) || recurses(&trace(error))
}

/// The number of functions on a stack from which few different ones are a recursion.
const RECURSION: usize = 16;

fn recurses(trace: &[String]) -> bool {
    let different: HashSet<&String> = trace.iter().collect();
    trace.len() >= RECURSION && different.len() <= trace.len() / 4
}

/// Limits of a trace's length and of its names, because the guest chooses both.
const FRAMES: usize = 24;
const FRAME_BYTES: usize = 200;

/// The guest's functions on the stack at a trap, demangled, innermost first.
pub(super) fn trace(error: &wasmtime::Error) -> Vec<String> {
    let Some(backtrace) = error.downcast_ref::<wasmtime::WasmBacktrace>() else {
        return Vec::new();
    };
    // wasmtime demangles only in its text, with lines `NUMBER: OFFSET - MODULE!FUNCTION`.
    let text = backtrace.to_string();
    let functions = text.lines().skip(1).filter_map(|line| line.split_once(" - ")).take(FRAMES);
    functions.map(|(_, place)| function(place)).collect()
}

/// A frame's function as in the source, without module and crate hashes.
fn function(place: &str) -> String {
    let name = place.split_once('!').map_or(place, |(_, name)| name).trim();
    let plain = |part: &str| match part.split_once(']') {
        Some((hash, rest)) if is_hash(hash) => rest.to_owned(),
        _ => format!("[{part}"),
    };
    let (first, rest) = name.split_once('[').map_or((name, None), |(a, b)| (a, Some(b)));
    let rest = rest.into_iter().flat_map(|rest| rest.split('[')).map(plain);
    let name = first.to_owned() + &rest.collect::<String>();
    // Names of the older mangling end in `::h` and a hash.
    let name = match name.rsplit_once("::h") {
        Some((name, hash)) if is_hash(hash) => name,
        _ => &name,
    };
    name[..name.floor_char_boundary(FRAME_BYTES)].escape_debug().to_string()
}

fn is_hash(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recursion_is_a_long_stack_of_few_functions() {
        let stack = |names: &[&str], frames: usize| {
            names.iter().cycle().take(frames).map(|name| name.to_string()).collect::<Vec<_>>()
        };
        assert!(recurses(&stack(&["descend"], 20)) && recurses(&stack(&["even", "odd"], 20)));
        assert!(!recurses(&stack(&["descend"], 5)));
        let names: Vec<String> = (0..20).map(|at| format!("layer{at}")).collect();
        assert!(!recurses(&names));
    }

    #[test]
    fn a_fault_tells_its_author_and_its_operator_what_it_is_to_them() {
        for call in Call::ALL {
            let fault = ExpertFault::new("feed", call, Fault::Deadline(50));
            let error = crate::Error::Fault(fault).to_string();
            for word in ["deadline of 50 ms", "author does less", "to operators it means that"] {
                assert!(error.contains(word), "{word}: {error}");
            }
        }
    }

    #[test]
    fn functions_are_named_without_module_and_hashes() {
        let cases = [
            ("a-a44fee246c00ee52.wasm!std[a543996e6e7dbf1e]::alloc::oom", "std::alloc::oom"),
            ("<unknown>!<[u8] as my[0123456789abcdef]::Trait>::go", "<[u8] as my::Trait>::go"),
            ("m!my::rank::h27c25fea5ec6e326", "my::rank"),
            ("m!f\u{1b}[2J", "f\\u{1b}[2J"),
        ];
        cases.iter().for_each(|(place, plain)| assert_eq!(function(place), *plain));
        assert_eq!(function(&"x".repeat(1000)).len(), FRAME_BYTES);
    }
}
