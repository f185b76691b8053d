//! What training minimises: the losses of tasks and what is added to them.

use super::{Graph, Tensor};
use crate::{losses, shape::Shape};

impl Graph {
    /// Sets the loss of a task, `[rows, 1]`, which the host averages over the task's rows, in place
    /// of the host's own. See [`losses`](crate::losses).
    pub fn loss(&self, task: &str, loss: Tensor<'_>) {
        self.check_loss(task, loss);
        let mut state = self.state.borrow_mut();
        if state.losses.iter().any(|(known, _)| known == task) {
            drop(state);
            self.fail(&format!("two losses of task `{task}`: add them to one"));
        } else {
            state.losses.push((task.into(), loss.node));
        }
    }

    /// Adds `loss`, `[rows, 1]`, to the loss of a task, be it [`Graph::loss`] or the host's own.
    /// For a part of the network that should learn the task by itself, besides what reaches it
    /// through the task's output.
    pub fn auxiliary_loss(&self, task: &str, loss: Tensor<'_>) {
        self.check_loss(task, loss);
        self.state.borrow_mut().auxiliary_losses.push((task.into(), loss.node));
    }

    /// Adds the mean of `loss`, `[rows, 1]`, to the losses of the tasks in training. Several are
    /// added up.
    pub fn extra_loss(&self, loss: Tensor<'_>) {
        if loss.shape() != Shape::rows(1) || loss.ids {
            self.fail(&format!("the extra loss must have shape [rows, 1], not {}", loss.shape()));
        }
        let earlier = self.state.borrow().extra_loss;
        let sum = earlier.map_or(loss, |node| self.number(node) + loss);
        self.state.borrow_mut().extra_loss = Some(sum.node);
    }

    fn check_loss(&self, task: &str, loss: Tensor<'_>) {
        if !self.tasks.iter().any(|known| known.name == task) {
            self.fail(&format!("loss of `{task}`, which is not in the description"));
        } else if loss.shape() != Shape::rows(1) || loss.ids {
            self.fail(&format!("the loss of `{task}` must be [rows, 1], not {}", loss.shape()));
        }
    }

    /// Puts the auxiliary losses into those of their tasks.
    pub(super) fn add_auxiliary_losses(&self) {
        let auxiliary = std::mem::take(&mut self.state.borrow_mut().auxiliary_losses);
        for (task, node) in auxiliary {
            // A task without an output is refused later.
            let Some(loss) = self.loss_of(&task) else { continue };
            let sum = loss + self.number(node);
            let losses = &mut self.state.borrow_mut().losses;
            losses.retain(|(known, _)| *known != task);
            losses.push((task, sum.node));
        }
    }

    /// The loss that was set for a task, or the host's own of its output.
    fn loss_of(&self, task: &str) -> Option<Tensor<'_>> {
        let state = self.state.borrow();
        let set = state.losses.iter().find(|(known, _)| known == task).map(|(_, node)| *node);
        let output = state.outputs.iter().find(|output| output.task == task);
        let output = output.map(|output| output.node);
        drop(state);
        set.map(|node| self.number(node))
            .or_else(|| Some(losses::of_host(task, self.number(output?))))
    }

    fn number(&self, node: u32) -> Tensor<'_> {
        Tensor { graph: self, node, ids: false }
    }
}
