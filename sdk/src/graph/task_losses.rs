//! What training minimises: the losses of tasks and what is added to them.

use super::{Graph, Tensor};
use crate::shape::Shape;

impl Graph {
    /// Sets the loss of a task, `[rows, 1]`, which the host averages over the task's rows, in place
    /// of the host's own. See [`losses`](crate::losses).
    pub fn loss(&self, task: &str, loss: Tensor<'_>) {
        if !self.tasks.iter().any(|known| known.name == task) {
            self.fail(&format!("loss of `{task}`, which is not in the description"));
        } else if self.state.borrow().losses.iter().any(|(known, _)| known == task) {
            self.fail(&format!("two losses of task `{task}`: add them to one"));
        } else if loss.shape() != Shape::rows(1) || loss.ids {
            self.fail(&format!("the loss of `{task}` must be [rows, 1], not {}", loss.shape()));
        } else {
            self.state.borrow_mut().losses.push((task.into(), loss.node));
        }
    }

    /// Adds the mean of `loss`, `[rows, 1]`, to the losses of the tasks in training. Several are
    /// added up.
    pub fn extra_loss(&self, loss: Tensor<'_>) {
        if loss.shape() != Shape::rows(1) || loss.ids {
            self.fail(&format!("the extra loss must have shape [rows, 1], not {}", loss.shape()));
        }
        let earlier = self.state.borrow().extra_loss;
        let number = |node| Tensor { graph: self, node, ids: false };
        let sum = earlier.map_or(loss, |node| number(node) + loss);
        self.state.borrow_mut().extra_loss = Some(sum.node);
    }
}
